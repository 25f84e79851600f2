// Runs once in the element that holds the tokens; `element`, `trigger` and `watch` are Gradio's.
const chosen = { color: "gate", block: "0", stream: "" };
let current = null, waiting = null;
const tokens = () => [...element.querySelectorAll(".t")];
const mean = values => {
  const known = values.filter(value => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};

function color() {
  const strip = element.querySelector(".engram-strip");
  if (!strip) return;
  const values = JSON.parse(strip.dataset.values);
  for (const select of strip.querySelectorAll("select")) {
    const name = select.dataset.choice;
    if ([...select.options].some(option => option.value === chosen[name])) select.value = chosen[name];
    else chosen[name] = select.value;
  }
  const byChange = chosen.color === "changed" && values.changed;
  const gated = values.gated.indexOf(values.blocks[Number(chosen.block)]);
  const numbers = byChange ? values.changed : gated < 0 ? null
    : tokens().map((_, i) => chosen.stream === "" ? mean(values.gates[gated].map(row => row[i]))
      : values.gates[gated][Number(chosen.stream)][i]);
  const top = byChange ? Math.max(0.01, ...values.changed.filter(value => value !== null)) : 1;
  tokens().forEach((span, i) => {
    const value = numbers === null ? undefined : numbers[i];
    span.classList.toggle("none", value === null);
    span.style.setProperty("--g", value ? value / top : 0);
    span.title = value === undefined ? "" : value === null ? "not finite"
      : (byChange ? value.toFixed(3) + " nats" : "gate " + value.toFixed(3));
  });
  const high = strip.querySelector("[data-high]");
  if (high) high.textContent = byChange ? top.toFixed(2) + " nats" : "1";
  const stream = strip.querySelector("select[data-choice=stream]");
  if (stream) stream.disabled = Boolean(byChange);
}

function pick(span, again) {
  const index = Number(span.dataset.i);
  for (const other of tokens()) {
    other.tabIndex = other === span ? 0 : -1;
    other.setAttribute("aria-selected", String(other === span));
  }
  if (index === current && !again) return;
  current = index;
  trigger("select", { index, block: Number(chosen.block) });
}

function refresh() {
  color();
  const all = tokens();
  if (!all.length) return;
  // The server has looked at the last token already; the same block and place need no second look.
  const last = all[all.length - 1];
  current = Number(last.dataset.i);
  for (const other of all) {
    other.tabIndex = other === last ? 0 : -1;
    other.setAttribute("aria-selected", String(other === last));
  }
}

function onNextLine(all, index, direction) {
  const box = all[index].getBoundingClientRect();
  let line = null, best = null;
  for (let i = index + direction; all[i]; i += direction) {
    const other = all[i].getBoundingClientRect();
    if ((other.top - box.top) * direction < box.height / 2) continue;
    if (line === null) line = other.top;
    if (Math.abs(other.top - line) > 4) break;
    const distance = Math.abs(other.left - box.left);
    if (best === null || distance < best.distance) best = { span: all[i], distance };
  }
  return best && best.span;
}

element.addEventListener("focusin", event => { if (event.target.matches(".t")) pick(event.target); });
element.addEventListener("click", event => { const span = event.target.closest(".t"); if (span) span.focus(); });
element.addEventListener("pointerover", event => {
  clearTimeout(waiting);
  const span = event.target.closest(".t");
  if (span) waiting = setTimeout(() => pick(span), 250);
});
element.addEventListener("pointerleave", () => clearTimeout(waiting));
element.addEventListener("change", event => {
  const name = event.target.dataset.choice;
  if (!name) return;
  chosen[name] = event.target.value;
  color();
  const span = tokens()[current];
  if (name === "block" && span) pick(span, true);
});
element.addEventListener("keydown", event => {
  const span = event.target.closest(".t");
  if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = tokens(), index = Number(span.dataset.i);
  const next = {
    ArrowRight: () => all[index + 1], ArrowLeft: () => all[index - 1],
    ArrowDown: () => onNextLine(all, index, 1), ArrowUp: () => onNextLine(all, index, -1),
    Home: () => all[0], End: () => all[all.length - 1],
  }[event.key];
  if (!next) return;
  event.preventDefault();
  const target = next();
  if (target) target.focus();
});
watch("value", refresh);
refresh();

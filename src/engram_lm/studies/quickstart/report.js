"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const gates = document.getElementById("gates");
  if (!gates) return;
  const panel = document.getElementById("panel");
  const texts = [...gates.querySelectorAll(".text")];
  const chosen = { block: 0, stream: 0 };
  let shown = null;

  const spansOf = text => [...text.querySelectorAll(".t")];
  const placeOf = span => {
    const text = span.closest(".text");
    return { text, trace: data.traces[texts.indexOf(text)], position: Number(span.dataset.i) };
  };

  function color() {
    texts.forEach((text, index) => {
      const values = data.traces[index].gates[chosen.block][chosen.stream];
      spansOf(text).forEach((span, i) => span.style.setProperty("--g", values[i]));
    });
    if (shown) show(shown);
  }

  function entry(list, name, ...content) {
    const term = document.createElement("dt"), detail = document.createElement("dd");
    term.textContent = name;
    detail.append(...content);
    list.append(term, detail);
    return detail;
  }

  function chips(tokens) {
    const box = document.createElement("span");
    box.className = "chips";
    for (const token of tokens) {
      const chip = document.createElement("span");
      chip.textContent = token.replace(/\n/g, "↵").replace(/ /g, "␣") || "·";
      box.append(chip);
    }
    return box;
  }

  function hide() {
    gates.querySelectorAll(".on, .seen").forEach(span => span.classList.remove("on", "seen"));
    panel.hidden = true;
    shown = null;
  }

  function show(span) {
    hide();
    shown = span;
    const { text, trace, position } = placeOf(span);
    const visible = trace.visible[position];
    const scores = trace.scores[chosen.block][chosen.stream].map(order => order[position]);
    const best = scores.indexOf(Math.max(...scores));
    const list = document.createElement("dl");
    entry(list, "token", chips([trace.tokens[position]]));
    entry(list, "gate", trace.gates[chosen.block][chosen.stream][position].toFixed(2));
    entry(list, "block", String(data.blocks[chosen.block]) + (data.streams > 1 ? ", stream " + chosen.stream : ""));
    const spans = spansOf(text);
    if (visible) {
      const length = Math.min(data.orders[best], visible);
      const start = position + 1 - length;
      const opened = scores[best] > 0 ? [] : ["none opened the gate; least against it: "];
      entry(list, "fired", ...opened, chips(trace.tokens.slice(start, position + 1)));
      const cut = length < data.orders[best] ? ", cut at the start of the segment" : "";
      entry(list, "order", data.orders[best] + "-gram" + cut);
      const signed = value => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
      entry(list, "score", scores.map((score, i) => data.orders[i] + "-gram " + signed(score)).join(" · "));
      for (let i = start; i < position; i++) spans[i].classList.add("seen");
    } else {
      entry(list, "fired", "nothing: memory is not read here");
    }
    span.classList.add("on");
    panel.replaceChildren(list);
    panel.hidden = false;
    place(span);
  }

  function place(span) {
    const frame = gates.getBoundingClientRect(), boxes = span.getClientRects();
    const box = boxes[boxes.length - 1];
    const left = Math.min(Math.max(0, box.left - frame.left), frame.width - panel.offsetWidth);
    const below = box.bottom - frame.top + 8, above = box.top - frame.top - panel.offsetHeight - 8;
    const fits = box.bottom + 8 + panel.offsetHeight <= innerHeight || box.top < panel.offsetHeight + 8;
    panel.style.left = Math.max(0, left) + "px";
    panel.style.top = (fits ? below : above) + "px";
  }

  function focus(span) {
    const text = span.closest(".text");
    text.querySelectorAll('.t[tabindex="0"]').forEach(other => other.tabIndex = -1);
    span.tabIndex = 0;
    span.focus();
  }

  function onNextLine(spans, index, direction) {
    const box = spans[index].getBoundingClientRect();
    let line = null, best = null;
    for (let i = index + direction; spans[i]; i += direction) {
      const other = spans[i].getBoundingClientRect();
      if ((other.top - box.top) * direction < box.height / 2) continue;
      if (line === null) line = other.top;
      if (Math.abs(other.top - line) > 4) break;
      const distance = Math.abs(other.left - box.left);
      if (best === null || distance < best.distance) best = { span: spans[i], distance };
    }
    return best && best.span;
  }

  gates.addEventListener("keydown", event => {
    if (event.key === "Escape") return hide();
    const span = event.target.closest(".t");
    if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
    const spans = spansOf(span.closest(".text")), index = spans.indexOf(span);
    const next = {
      ArrowRight: () => spans[index + 1], ArrowLeft: () => spans[index - 1],
      ArrowDown: () => onNextLine(spans, index, 1), ArrowUp: () => onNextLine(spans, index, -1),
      Home: () => spans[0], End: () => spans[spans.length - 1],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    const target = next();
    if (target) focus(target);
  });
  gates.addEventListener("focusin", event => { if (event.target.matches(".t")) show(event.target); });
  gates.addEventListener("focusout", event => { if (event.target.matches(".t")) hide(); });
  const rest = () => {
    const focused = document.activeElement;
    if (focused && focused.matches("#gates .t")) show(focused); else hide();
  };
  gates.addEventListener("pointerover", event => { if (event.target.matches(".t")) show(event.target); else rest(); });
  gates.addEventListener("pointerleave", rest);
  gates.addEventListener("click", event => {
    const button = event.target.closest("button[data-choice]");
    if (!button) return;
    chosen[button.dataset.choice] = Number(button.value);
    button.parentElement.querySelectorAll("button").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
    color();
  });
  addEventListener("resize", () => { if (shown) place(shown); });
})();

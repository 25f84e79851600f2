"use strict";
(() => {
  const find = id => document.getElementById(id);
  const element = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const models = JSON.parse(find("data").textContent);

  // What is chosen, and the mean that it makes of gates [block][stream] ---------------------------------------------

  const chosen = { model: 0, passage: 0, blocks: new Set(), stream: null };
  const mean = values => {
    const known = values.filter(value => value !== null && value !== undefined);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };
  const ofBlock = streams => chosen.stream === null ? mean(streams) : streams[chosen.stream];
  const gateOf = blocks => mean([...chosen.blocks].map(block => ofBlock(blocks[block])));
  const shown = gate => gate === null ? "none (not finite)" : (gate / 1000).toFixed(3);
  const visible = text => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "·";

  function chips(texts) {
    const box = element("span", undefined, "chips");
    for (const text of texts) box.append(element("span", visible(text)));
    return box;
  }

  function entry(list, name, ...content) {
    const detail = element("dd");
    detail.append(...content);
    list.append(element("dt", name), detail);
  }

  // A text whose tokens are colored and can be walked through --------------------------------------------------------

  class ColoredText {
    constructor(box, line, describe, idle) {
      Object.assign(this, { box, line, describe, idle, spans: [], current: null });
      const tokenOf = event => event.target.closest(".t");
      box.addEventListener("focusin", event => { if (tokenOf(event)) this.show(tokenOf(event)); });
      box.addEventListener("focusout", () => this.rest());
      box.addEventListener("pointerover", event => { if (tokenOf(event)) this.show(tokenOf(event)); else this.rest(); });
      box.addEventListener("pointerleave", () => this.rest());
      box.addEventListener("keydown", event => this.walk(event));
    }

    fill(texts) {
      this.spans = texts.map((text, index) => {
        const span = element("span", text, "t" + (text === "" ? " piece" : text.includes("\n") ? " line-end" : ""));
        span.dataset.i = index;
        span.tabIndex = index === 0 ? 0 : -1;
        return span;
      });
      this.box.replaceChildren(...this.spans);
      this.current = null;
      this.rest();
    }

    color(gates) {
      this.spans.forEach((span, index) => {
        const gate = gates[index];
        span.classList.toggle("none", gate === null || gate === undefined);
        span.style.setProperty("--g", (gate || 0) / 1000);
        if (gate === null || gate === undefined) delete span.dataset.v;
        else span.dataset.v = (gate / 1000).toFixed(2).replace(/^0/, "");
      });
      if (this.current) this.show(this.current);
    }

    clear() { this.spans.forEach(span => span.classList.remove("on", "seen")); }

    rest() {
      const focused = document.activeElement;
      if (focused && focused.matches(".t") && this.box.contains(focused)) return this.show(focused);
      this.clear();
      this.current = null;
      this.line.replaceChildren(this.idle());
    }

    show(span) {
      this.clear();
      this.current = span;
      span.classList.add("on");
      const { list, seen } = this.describe(Number(span.dataset.i));
      for (const index of seen) if (this.spans[index] !== span) this.spans[index].classList.add("seen");
      this.line.replaceChildren(list);
    }

    walk(event) {
      const span = event.target.closest(".t");
      if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
      const index = Number(span.dataset.i);
      const next = {
        ArrowRight: () => this.spans[index + 1], ArrowLeft: () => this.spans[index - 1],
        ArrowDown: () => this.onNextLine(index, 1), ArrowUp: () => this.onNextLine(index, -1),
        Home: () => this.spans[0], End: () => this.spans[this.spans.length - 1],
      }[event.key];
      if (!next) return;
      event.preventDefault();
      const target = next();
      if (!target) return;
      for (const other of this.spans) if (other.tabIndex === 0) other.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    }

    onNextLine(index, direction) {
      const box = this.spans[index].getBoundingClientRect();
      let line = null, best = null;
      for (let i = index + direction; this.spans[i]; i += direction) {
        const other = this.spans[i].getBoundingClientRect();
        if ((other.top - box.top) * direction < box.height / 2) continue;
        if (line === null) line = other.top;
        if (Math.abs(other.top - line) > 4) break;
        const distance = Math.abs(other.left - box.left);
        if (best === null || distance < best.distance) best = { span: this.spans[i], distance };
      }
      return best && best.span;
    }
  }

  // Passages ---------------------------------------------------------------------------------------------------------

  const blockNames = model => [...chosen.blocks].sort((a, b) => a - b).map(index => model.blocks[index]);
  const whose = model => {
    const names = blockNames(model);
    const stream = model.streams < 2 ? "" : chosen.stream === null ? ", mean of the streams" : ", stream " + chosen.stream;
    return (names.length > 1 ? "mean of blocks " : "block ") + names.join(", ") + stream;
  };

  function describeToken(position) {
    const model = models[chosen.model], passage = model.passages[chosen.passage];
    const list = element("dl"), seen = new Set();
    entry(list, "token", chips([passage.tokens[position]]));
    const gates = passage.gates.map(streams => streams.map(tokens => tokens[position]));
    entry(list, "gate", shown(gateOf(gates)) + " (" + whose(model) + ")");
    const reach = passage.visible[position];
    if (!reach) {
      entry(list, "fired", "nothing: the memory is not read here");
      return { list, seen };
    }
    for (const block of [...chosen.blocks].sort((a, b) => a - b)) {
      const scores = model.orders.map((_, order) => {
        const streams = passage.scores[block].map(orders => orders[order][position]);
        if (chosen.stream !== null) return streams[chosen.stream];
        return streams.includes(null) ? null : streams.reduce((sum, value) => sum + value, 0);
      });
      if (scores.includes(null)) {
        entry(list, "block " + model.blocks[block], "none: scores are not finite");
        continue;
      }
      const best = scores.indexOf(Math.max(...scores));
      const length = Math.min(model.orders[best], reach);
      const start = Math.max(0, position + 1 - length);
      for (let i = start; i < position; i++) seen.add(i);
      const cut = length < model.orders[best] ? ", cut at the start of the segment" : "";
      const signed = (scores[best] < 0 ? "−" : "+") + Math.abs(scores[best] / 100).toFixed(2);
      entry(
        list, "block " + model.blocks[block], shown(ofBlock(gates[block])) + "; " + model.orders[best] + "-gram ",
        chips(passage.tokens.slice(start, position + 1)), " adds most to the score, " + signed + cut,
      );
    }
    return { list, seen };
  }

  // Typed text: what is known of it --------------------------------------------------------------------------------

  let lookup = new Map(), endings = new Map(), longest = 0, pieces = [];
  const word = /[\p{L}\p{N}_]/u;

  // Fold text as the hash does: spaces become one, and case and accents go if the model has canonical tokens.
  function fold(text, folds) {
    let folded = "", places = [], at = 0;
    for (const character of text) {
      let parts = character;
      if (folds) parts = character.normalize("NFKC").normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
      if (/^\s+$/u.test(parts)) parts = folded.endsWith(" ") ? "" : " ";
      for (let i = 0; i < parts.length; i++) places.push(at);
      folded += parts;
      at += character.length;
    }
    places.push(at);
    return { folded, places };
  }

  function learn(model) {
    lookup = new Map();
    longest = 0;
    model.phrases.forEach((phrase, index) => {
      const key = fold(phrase[0], model.folds).folded.trim();
      // Among phrases that look alike the first one stays; it fired most often.
      if (!key || lookup.has(key)) return;
      lookup.set(key, index);
      longest = Math.max(longest, key.length);
    });
    endings = new Map();
    const add = (text, fired, gates) => {
      const key = fold(text, model.folds).folded.trim();
      if (!key) return;
      if (!endings.has(key)) endings.set(key, { times: 0, parts: [] });
      const ending = endings.get(key);
      ending.times += Math.max(...fired);
      ending.parts.push({ fired, gates });
    };
    for (const [, last, , , fired, gates] of model.phrases) add(last, fired, gates);
    const once = model.blocks.map(() => 1);
    const ofNgrams = new Set(endings.keys());
    for (const passage of model.passages) {
      passage.tokens.forEach((token, i) => {
        if (!passage.visible[i] || ofNgrams.has(fold(token, model.folds).folded.trim())) return;
        add(token, once, passage.gates.map(streams => streams.map(tokens => tokens[i])));
      });
    }
  }

  // The mean gate of all N-grams that end in a word, weighted by how often each fired.
  function endingGate(ending) {
    return mean([...chosen.blocks].map(block => {
      let sum = 0, times = 0;
      for (const { fired, gates } of ending.parts) {
        const gate = ofBlock(gates[block]);
        if (gate === null || !fired[block]) continue;
        sum += fired[block] * gate;
        times += fired[block];
      }
      return times ? sum / times : null;
    }));
  }

  const pieceGate = ({ phrase, ending }) =>
    phrase !== null ? gateOf(models[chosen.model].phrases[phrase][5]) : ending ? endingGate(ending) : null;

  function recall(text) {
    const model = models[chosen.model], { folded, places } = fold(text, model.folds);
    const found = [];
    const inside = place => place > 0 && place < folded.length && word.test(folded[place - 1]) && word.test(folded[place]);
    for (let end = 1; end <= folded.length; end++) {
      if (folded[end - 1] === " " || inside(end)) continue;
      for (let start = Math.max(0, end - longest); start < end; start++) {
        if (folded[start] === " " || inside(start)) continue;
        const phrase = lookup.get(folded.slice(start, end)), ending = endings.get(folded.slice(start, end));
        if (phrase !== undefined) {
          const last = fold(model.phrases[phrase][1], model.folds).folded.trim().length;
          found.push({ phrase, ending: null, start: places[Math.max(start, end - last)], end: places[end] });
          break;
        }
        if (ending !== undefined) {
          found.push({ phrase: null, ending, start: places[start], end: places[end] });
          break;
        }
      }
    }
    pieces = [];
    let at = 0;
    for (const piece of found) {
      if (piece.start < at) continue;
      if (piece.start > at) pieces.push({ text: text.slice(at, piece.start), phrase: null, ending: null });
      pieces.push({ text: text.slice(piece.start, piece.end), phrase: piece.phrase, ending: piece.ending });
      at = piece.end;
    }
    if (at < text.length) pieces.push({ text: text.slice(at), phrase: null, ending: null });
  }

  function describePiece(index) {
    const model = models[chosen.model], list = element("dl"), { text, phrase, ending } = pieces[index];
    if (phrase === null && ending !== null) {
      entry(list, "word", chips([text]), " at the end of other N-grams, " + ending.times.toLocaleString("en") + " times");
      entry(list, "mean gate", shown(endingGate(ending)) + " (" + whose(model) + ")");
      return { list, seen: [] };
    }
    if (phrase === null) {
      entry(list, "text", chips([text]));
      entry(list, "gate", "none: not among the N-grams that were seen");
      return { list, seen: [] };
    }
    const [spelled, , order, count, , gates] = model.phrases[phrase];
    entry(list, "N-gram", chips([spelled]), " " + order + "-gram, " + count.toLocaleString("en") + " times in the text");
    entry(list, "mean gate", shown(gateOf(gates)) + " (" + whose(model) + ")");
    return { list, seen: [] };
  }

  // The page -------------------------------------------------------------------------------------------------------

  const hint = () => element("span", "Point at a token, or move to it with Tab and the arrow keys.");
  const known = () => {
    if (!pieces.length) return element("span", "Nothing typed yet.");
    const ngrams = pieces.filter(piece => piece.phrase !== null).length;
    const words = pieces.filter(piece => piece.ending !== null).length;
    const unknown = pieces.filter(piece => piece.phrase === null && piece.ending === null && piece.text.trim()).length;
    return element("span", "Colored: " + ngrams + " as the end of a known N-gram, " + words + " as a known word; " + unknown +
      (unknown === 1 ? " piece has" : " pieces have") + " no value.");
  };
  let passageText = null, typedText = null;

  function recolor() {
    const model = models[chosen.model], passage = model.passages[chosen.passage];
    passageText.color(passage.tokens.map((_, i) => passage.visible[i]
      ? gateOf(passage.gates.map(streams => streams.map(tokens => tokens[i]))) : 0));
    typedText.color(pieces.map(pieceGate));
    listNgrams();
  }

  function retype() {
    recall(find("typed").value);
    typedText.fill(pieces.map(piece => piece.text));
    find("typed-text").hidden = !pieces.length;
    recolor();
  }

  function buttons(box, names, pressed, choose) {
    box.replaceChildren(...names.map((name, index) => {
      const button = element("button", name);
      button.type = "button";
      button.setAttribute("aria-pressed", String(pressed(index)));
      button.addEventListener("click", () => {
        choose(index);
        [...box.children].forEach((other, place) => other.setAttribute("aria-pressed", String(pressed(place))));
        recolor();
      });
      return button;
    }));
  }

  function choosePassage(index) {
    chosen.passage = index;
    const passage = models[chosen.model].passages[index];
    passageText.fill(passage.tokens);
    find("passage-text").setAttribute("aria-label", "Passage " + (index + 1) + ", " + passage.tokens.length + " tokens");
    recolor();
  }

  function chooseModel(index) {
    const model = models[index];
    Object.assign(chosen, { model: index, blocks: new Set(model.blocks.keys()), stream: null });
    find("passage").replaceChildren(...model.passages.map((passage, place) => {
      const begins = passage.tokens.join("").trim().replace(/\s+/g, " ").slice(0, 28);
      const option = element("option", (place + 1) + ": " + begins + "…");
      option.value = place;
      return option;
    }));
    buttons(find("blocks"), model.blocks.map(String), place => chosen.blocks.has(place), place => {
      // The last one stays: without any there is nothing to show.
      if (!chosen.blocks.delete(place)) chosen.blocks.add(place);
      if (!chosen.blocks.size) chosen.blocks.add(place);
    });
    const streams = ["mean", ...Array.from({ length: model.streams }, (_, stream) => String(stream))];
    const place = stream => stream === null ? 0 : stream + 1;
    buttons(find("streams"), streams, at => place(chosen.stream) === at, at => { chosen.stream = at === 0 ? null : at - 1; });
    find("streams").closest(".choice").hidden = model.streams < 2;
    learn(model);
    choosePassage(Math.min(chosen.passage, model.passages.length - 1));
    retype();
  }

  // N-grams --------------------------------------------------------------------------------------------------------

  const order = { key: "gate", direction: -1 };
  const MOST_ROWS = 100;

  function listNgrams() {
    const body = find("ngram-rows");
    if (!body) return;
    const model = models[chosen.model], least = Number(find("least").value), part = find("find").value.toLowerCase();
    const rows = [];
    for (const [text, , size, count, fired, gates] of model.phrases) {
      const times = Math.max(...[...chosen.blocks].map(block => fired[block]));
      const gate = gateOf(gates);
      if (times >= least && gate !== null && text.toLowerCase().includes(part)) {
        rows.push({ text, order: size, count, fired: times, gate });
      }
    }
    const compare = order.key === "text" ? (a, b) => a.text.localeCompare(b.text) : (a, b) => a[order.key] - b[order.key];
    rows.sort((a, b) => order.direction * compare(a, b) || b.fired - a.fired || a.text.localeCompare(b.text));
    body.replaceChildren(...rows.slice(0, MOST_ROWS).map(row => {
      const line = element("tr"), spelled = element("td"), gate = element("td", shown(row.gate));
      const name = element("span", undefined, "ngram");
      for (const part of row.text.split(/([ \n\t])/)) {
        if (part) name.append(/^[ \n\t]$/.test(part) ? element("i", visible(part)) : part);
      }
      spelled.append(name);
      const bar = element("span", undefined, "bar");
      bar.style.setProperty("--w", row.gate / 10 + "%");
      gate.append(bar);
      line.append(spelled, gate, ...[row.count, row.fired, row.order].map(value => element("td", value.toLocaleString("en"))));
      return line;
    }));
    find("ngram-count").textContent = Math.min(rows.length, MOST_ROWS) + " of " + rows.length.toLocaleString("en") + " shown";
    for (const head of document.querySelectorAll("#ngrams th")) {
      if (head.dataset.key !== order.key) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", order.direction < 0 ? "descending" : "ascending");
    }
  }

  if (!models.length) return;
  passageText = new ColoredText(find("passage-text"), find("passage-line"), describeToken, hint);
  typedText = new ColoredText(find("typed-text"), find("typed-line"), describePiece, known);
  if (find("model")) find("model").addEventListener("change", event => chooseModel(Number(event.target.value)));
  find("passage").addEventListener("change", event => choosePassage(Number(event.target.value)));
  find("typed").addEventListener("input", retype);
  find("numbers").addEventListener("click", () => {
    const on = find("gates").classList.toggle("numbers");
    find("numbers").setAttribute("aria-pressed", String(on));
  });
  if (find("ngrams")) {
    find("least").addEventListener("change", listNgrams);
    find("find").addEventListener("input", listNgrams);
    for (const head of document.querySelectorAll("#ngrams th")) {
      head.querySelector("button").addEventListener("click", () => {
        const turned = order.key === head.dataset.key;
        order.direction = turned ? -order.direction : head.dataset.key === "text" ? 1 : -1;
        order.key = head.dataset.key;
        listNgrams();
      });
    }
  }
  chooseModel(0);
})();

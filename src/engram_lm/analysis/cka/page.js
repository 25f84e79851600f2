(() => {
  // The cells of the maps can be pointed at, and walked through with the arrow keys.

  for (const map of document.querySelectorAll(".map")) {
    const picture = map.querySelector("svg"), line = map.querySelector(".line");
    const cells = [...picture.querySelectorAll(".cell")], width = Number(picture.dataset.columns);
    const idle = line.textContent;
    let current = -1;
    const show = index => {
      if (cells[current]) cells[current].classList.remove("on");
      current = index;
      if (cells[current]) cells[current].classList.add("on");
      line.textContent = cells[current] ? cells[current].getAttribute("aria-label") : idle;
    };
    picture.addEventListener("pointerover", event => show(cells.indexOf(event.target)));
    picture.addEventListener("pointerleave", () => show(-1));
    picture.addEventListener("focus", () => { if (current < 0) show(0); });
    picture.addEventListener("blur", () => show(-1));
    picture.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = current + step, sideways = Math.abs(step) === 1;
      if (next < 0 || next >= cells.length) return;
      if (sideways && Math.floor(next / width) !== Math.floor(current / width)) return;
      show(next);
    });
  }
})();

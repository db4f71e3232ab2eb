"use strict";

// Moving about on a chart with the mouse, fingers and keys: drag, arrows and shift with the wheel pan; ctrl with the wheel,
// a pinch, + and - zoom; a double click goes to what is under it.
//   Pointing.on(canvas, {gutter(), at(px), pan(share), zoom(factor, at), says(px, py), click(px, py), double(px, py), keys})
const Pointing = (() => {
  const STILL = 4; // px that a click may move

  function on(canvas, { gutter, at, pan, zoom, says, click, double, keys }) {
    const pointers = new Map(); // id -> px
    const room = () => canvas.clientWidth - gutter();
    let moved = false;

    const tip = (event) => Views.tip(says(event.offsetX, event.offsetY), event.clientX, event.clientY);

    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event.offsetX);
      moved = false;
      Views.tip(null);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId), px = event.offsetX;
      if (before === undefined) return tip(event);
      if (pointers.size === 2) {
        const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
        zoom(Math.abs(before - other) / Math.max(8, Math.abs(px - other)), at((px + other) / 2));
      } else if (moved || Math.abs(px - before) >= STILL) pan((before - px) / room());
      else return null;
      moved = true;
      return pointers.set(event.pointerId, px);
    });
    canvas.addEventListener("pointerup", (event) => {
      pointers.delete(event.pointerId);
      if (moved) return;
      tip(event);
      click(event.offsetX, event.offsetY);
    });
    canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => Views.tip(null));
    canvas.addEventListener("dblclick", (event) => double(event.offsetX, event.offsetY));
    canvas.addEventListener("wheel", (event) => {
      const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
      if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY / 300), at(event.offsetX));
      else if (sideways) pan((event.deltaX || event.deltaY) / room());
      else return; // the page scrolls
      event.preventDefault();
    }, { passive: false });

    const moves = {
      ArrowLeft: () => pan(-0.15), ArrowRight: () => pan(0.15), "+": () => zoom(0.7), "=": () => zoom(0.7),
      "-": () => zoom(1 / 0.7), ...keys,
    };
    canvas.addEventListener("keydown", (event) => {
      if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      moves[event.key]();
      event.preventDefault();
    });
  }

  return { on };
})();

"use strict";

// The late task of a step on the chart: outlined, in words what it waited for, and an arrow from the read that it waited for.
//   Late.draw(pen, scale, late of GET steps/n, {y, read: y of the read's lane or null, height}) -> what was drawn, or null
const Late = (() => {
  function draw(pen, scale, late, { y, read, height }) {
    const a = scale.x(late.start * 1e9), b = scale.x(late.end * 1e9);
    if (b < scale.left || a > scale.right) return null;
    pen.strokeStyle = Colours.css("slow");
    pen.fillStyle = Colours.css("slow");
    outline(pen, a, b, y, height, 2.5);
    if (read !== null) {
      const from = scale.x(late.read.start * 1e9), to = scale.x(late.read.end * 1e9), below = read > y;
      outline(pen, from, to, read, height, 2);
      const goesOn = Math.min(b, scale.x((late.start + late.waited_s) * 1e9));
      arrow(pen, to, below ? read - 3 : read + height + 3, goesOn, below ? y + height + 3 : y - 3);
    }
    const text = words(late);
    tag(pen, text, Math.max(a + 6, scale.left + 6), y + height / 2, scale);
    return { task: late.task, x: a, y, width: b - a, text };
  }

  function words(late) {
    if (late.waits_for) return `waited ${Units.seconds(late.waited_s)} for ${late.waits_for}`;
    const planned = late.planned_s === null ? "" : `, planned ${Units.seconds(late.planned_s)}`;
    return `${late.task}: ${Units.seconds(late.actual_s)}${planned}`;
  }

  function outline(pen, a, b, y, height, thick) {
    pen.lineWidth = thick;
    pen.strokeRect(a - 1, y - 2, Math.max(4, b - a + 2), height + 4);
  }

  function arrow(pen, x0, y0, x1, y1) {
    const middle = (y0 + y1) / 2, head = y1 > y0 ? -6 : 6;
    pen.beginPath();
    pen.moveTo(x0, y0);
    pen.bezierCurveTo(x0, middle, x1, middle, x1, y1 + head);
    pen.stroke();
    pen.beginPath();
    pen.moveTo(x1 - 4, y1 + head);
    pen.lineTo(x1 + 4, y1 + head);
    pen.lineTo(x1, y1);
    pen.fill();
  }

  function tag(pen, text, x, y, scale) {
    const wide = Math.min(pen.measureText(text).width + 12, scale.right - scale.left - 12);
    const left = Math.min(x, scale.right - wide - 6);
    pen.save();
    pen.fillStyle = Colours.css("page");
    pen.lineWidth = 1;
    pen.beginPath();
    pen.roundRect(left, y - 8, wide, 16, 4);
    pen.fill();
    pen.stroke();
    pen.clip();
    pen.fillStyle = Colours.css("slow");
    pen.fillText(text, left + 6, y + 0.5);
    pen.restore();
  }

  return { draw };
})();

"use strict";

// How a place is shown wherever pages and tasks are drawn: a colour for each device; where something is stored elsewhere than
// it is computed, the upper half is the storing device's, hatched, and the lower half the computing one's.
const Places = (() => {
  const HEAD = 100; // px above the rows of a grid or map: the names of parts, the numbers of experts
  const COLOURS = 7; // --place-0 to --place-6 in views.css

  const stacked = matchMedia("(max-width: 640px)"); // a map stands below its grid then, as views.css has it
  const rowHeight = ({ layers }) => Math.max(9, Math.min(26, Math.floor(600 / Math.max(1, layers.length))));

  // The style sheet's variable for a device: disks look alike, the others take turns.
  function variable(placement, name) {
    const device = placement.devices.find((one) => one.name === name);
    if (!device) return "place-unknown";
    if (device.kind === "DISK") return "place-disk";
    return `place-${placement.devices.filter(({ kind }) => kind !== "DISK").indexOf(device) % COLOURS}`;
  }

  function paint(element, placement, { device, home }) {
    const [computed, stored] = [device, home].map((name) => `var(--${variable(placement, name)})`);
    const hatch = "repeating-linear-gradient(135deg, transparent 0 3px, var(--page) 3px 4px)";
    element.style.background = device === home ? computed : `linear-gradient(transparent 50%, ${computed} 50%), ${hatch}, ${stored}`;
  }

  const said = ({ device, home }) => (device === home ? `on ${device}` : `computed on ${device}, stored on ${home}`);

  // Every pair of places that occurs, with the bytes it holds.
  function legend(placement) {
    const found = new Map();
    const cells = placement.cells.flat().filter(Boolean).flatMap(({ where }) => where);
    for (const row of [...cells, ...placement.others]) {
      const before = found.get(said(row));
      found.set(said(row), { ...row, bytes: row.bytes + (before ? before.bytes : 0) });
    }
    const order = (name) => placement.devices.findIndex((device) => device.name === name);
    const sorted = [...found].sort(([, a], [, b]) => order(a.device) - order(b.device) || order(a.home) - order(b.home));
    const items = sorted.map(([text, row]) => {
      const sample = Views.make("i", { class: "sample" });
      paint(sample, placement, row);
      return Views.make("li", {}, sample, `${text}: ${Units.bytes(row.bytes)}`);
    });
    return Views.make("ul", { class: "legend places" }, ...items);
  }

  return { HEAD, stacked, rowHeight, variable, paint, said, legend };
})();

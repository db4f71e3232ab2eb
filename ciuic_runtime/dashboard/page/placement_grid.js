"use strict";

// A grid of layers by parts from what "placement" answers. What is asked about a cell is the affair of whoever draws it.
//   PlacementGrid.draw(placement, {tell, pick}): tell(text) says what a cell holds, pick(name) is called for a chosen one
const PlacementGrid = (() => {
  function draw(placement, { tell = () => {}, pick = () => {} } = {}) {
    const heads = placement.parts.map((part) => Views.make("th", { scope: "col" }, Views.make("span", { text: part })));
    const cells = placement.layers.map((_, row) => placement.parts.map((_, column) => cell(placement, row, column)));
    const height = Places.rowHeight(placement), every = Math.ceil(13 / height); // rows that have room for their number
    const lines = cells.map((line, row) => Views.make("tr", {}, Views.make("th", { scope: "row", "aria-label": `layer ${placement.layers[row]}`,
      text: row % every ? "" : placement.layers[row] }), ...line));
    const table = Views.make("table", { class: "place-grid", role: "grid", "aria-label": "Layers and their parts, by where they are" },
      Views.make("thead", {}, Views.make("tr", {}, Views.make("th", { text: "layer" }), ...heads)), Views.make("tbody", {}, ...lines));
    table.style.setProperty("--row", `${height}px`);
    table.style.setProperty("--head", `${Places.HEAD}px`);
    walk(table, cells, {
      tell: (row, column) => tell(describe(placement, row, column)),
      pick: (row, column) => placement.cells[row][column] && pick(nameOf(placement, row, column)),
    });
    return table;
  }

  const nameOf = ({ layers, parts }, row, column) => `layers.${layers[row]}.${parts[column]}`;

  function cell(placement, row, column) {
    const held = placement.cells[row][column];
    const pieces = (held ? held.where : []).map((where) => {
      const piece = Views.make("i");
      piece.style.flexGrow = where.bytes || 1;
      Places.paint(piece, placement, where);
      return piece;
    });
    return Views.make("td", { role: "gridcell", tabindex: -1, "aria-label": describe(placement, row, column) },
      Views.make("div", {}, ...pieces));
  }

  function describe(placement, row, column) {
    const held = placement.cells[row][column];
    const name = nameOf(placement, row, column);
    if (!held) return `${name}: this layer has none`;
    const places = held.where.map((where) => {
      const several = where.count > 1 || held.where.length > 1;
      return several ? `${Units.count(where.count)} ${Places.said(where)} (${Units.bytes(where.bytes)})` : Places.said(where);
    });
    return `${name}: ${Units.bytes(held.bytes)}; ${places.join(", ")}`;
  }

  // One cell is in the order of the tab key; arrows go on from it.
  function walk(table, cells, { tell, pick }) {
    let at = [0, 0];
    const find = (event) => {
      const wanted = event.target.closest("td");
      const row = cells.findIndex((line) => line.includes(wanted));
      return row < 0 ? null : [row, cells[row].indexOf(wanted)];
    };
    const stand = (row, column) => {
      cells[at[0]][at[1]].tabIndex = -1;
      at = [row, column];
      cells[row][column].tabIndex = 0;
    };
    const go = (row, column) => cells[row]?.[column]?.focus();
    const over = (event) => {
      const found = find(event);
      if (!found) return;
      if (event.type === "focusin") stand(...found);
      tell(...found);
    };
    if (cells[0]?.length) stand(0, 0);
    table.addEventListener("focusin", over);
    table.addEventListener("pointerover", over);
    table.addEventListener("click", (event) => {
      const found = find(event);
      if (!found) return;
      go(...found);
      pick(...found);
    });
    table.addEventListener("keydown", (event) => {
      const [row, column] = at;
      const act = {
        ArrowUp: () => go(row - 1, column), ArrowDown: () => go(row + 1, column),
        ArrowLeft: () => go(row, column - 1), ArrowRight: () => go(row, column + 1),
        Home: () => go(row, 0), End: () => go(row, cells[row].length - 1),
        PageUp: () => go(0, column), PageDown: () => go(cells.length - 1, column),
        Enter: () => pick(row, column), " ": () => pick(row, column),
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      act();
      event.preventDefault();
    });
  }

  return { draw };
})();

"use strict";

// A canvas of layers by routed experts from what "placement" answers; its rows stand beside those of the grid.
//   ExpertMap.draw(placement, {tell, pick}) -> {root, show(way), leave()}
const ExpertMap = (() => {
  const GUTTER = 8; // px left of the first expert
  const GRADES = ["#00224e", "#1c3872", "#434e6c", "#61656f", "#7d7c78", "#9b9477", "#bcaf6f", "#dfcb5d", "#fee838"]; // cividis
  const WAYS = {
    where: "where it lives", popularity: "popularity", uses: "uses so far", hits: "how often it was in memory when used",
    resident: "what is in memory now",
  };
  const ways = (experts) => Object.keys(WAYS).filter((way) => way === "where" || (experts[way] && (way !== "hits" || experts.uses)));

  // What the map shows in one way: from row and expert a share of 0 to 1 (null: unknown), and what both ends mean.
  function scale({ popularity, uses, hits, resident }, way) {
    if (way === "popularity") {
      const most = Math.max(...popularity.flat());
      const value = (row, i) => (popularity[row][i] === undefined ? null : popularity[row][i] / most);
      return { value, low: "0 %", high: `${Units.percent(most)} of its layer's uses` };
    }
    if (way === "uses") {
      const most = Math.max(1, ...uses.flat());
      const value = (row, i) => Math.log1p(uses[row][i]) / Math.log1p(most);
      return { value, low: "0", high: `${Units.number(most, "use")} (logarithmic)` };
    }
    if (way === "hits") {
      const value = (row, i) => (uses[row][i] ? hits[row][i] / uses[row][i] : null);
      return { value, low: "0 %", high: "100 % of its uses; hatched: never used" };
    }
    return { value: (row, i) => Number(resident[row][i]), low: "not in memory", high: "in memory" };
  }

  const GRADED = Array.from({ length: 65 }, (_, n) => {
    const at = (n / 64) * (GRADES.length - 1), low = Math.min(Math.floor(at), GRADES.length - 2);
    const [from, to] = [GRADES[low], GRADES[low + 1]].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    return `rgb(${from.map((value, i) => Math.round(value + (to[i] - value) * (at - low))).join(", ")})`;
  });

  function describe({ devices, experts }, row, i) {
    const name = `layers.${experts.layers[row]}.experts.${i}`;
    if (experts.home[row][i] === null) return `${name}: not a part of this plan`;
    const [device, home] = [experts.device, experts.home].map((table) => devices[table[row][i]].name);
    const uses = experts.uses?.[row][i], liked = experts.popularity?.[row][i];
    const said = [
      Places.said({ device, home }),
      liked === undefined ? "" : `${Units.percent(liked)} of the layer's uses expected`,
      experts.uses ? `used ${uses === 1 ? "once" : `${Units.count(uses)} times`}` : "",
      experts.hits && uses ? `${Units.percent(experts.hits[row][i] / uses)} of them found in memory` : "",
      experts.resident ? `${experts.resident[row][i] ? "" : "not "}in memory now` : "",
    ];
    return `${name}: ${said.filter(Boolean).join(", ")}`;
  }

  function draw(placement, { tell = () => {}, pick = () => {} } = {}) {
    const { experts, layers } = placement, count = experts.num_experts;
    const row = Places.rowHeight(placement);
    const head = () => (Places.stacked.matches ? 34 : Places.HEAD);
    const top = (r) => head() + layers.indexOf(experts.layers[r]) * row;
    const canvas = Views.make("canvas", { tabindex: 0, role: "application",
      "aria-label": "Map of the routed experts, layers by experts. Arrow keys move, Enter tells why a page is where it is." });
    const key = Views.make("p", { class: "scale soft", hidden: true });
    let graded = null, cursor = null;

    const left = (i) => GUTTER + Math.round(i * (canvas.clientWidth - GUTTER) / count);

    const paint = Views.frame(() => {
      const width = canvas.clientWidth, height = head() + layers.length * row, step = (width - GUTTER) / count;
      canvas.style.height = `${height}px`;
      const pen = Views.pen(canvas, width, height), gap = step > 5 ? 1 : 0;
      const hatch = Colours.hatch(pen, "page"), plain = Colours.css("line");
      const places = placement.devices.map(({ name }) => Colours.css(Places.variable(placement, name)));
      const lefts = Array.from({ length: count + 1 }, (_, i) => left(i));
      const box = [0, 0, 0, row - 1];
      pen.fillStyle = Colours.css("page");
      pen.fillRect(0, 0, width, height);
      numbers(pen, step);
      for (let r = 0; r < experts.layers.length; r++) {
        box[1] = top(r);
        for (let i = 0; i < count; i++) {
          box[0] = lefts[i];
          box[2] = Math.max(lefts[i + 1] - lefts[i] - gap, 1);
          const value = graded ? graded.value(r, i) : 0, [device, home] = [experts.device[r][i], experts.home[r][i]];
          if (home === null) continue; // the plan is of a part of the model
          pen.fillStyle = !graded ? places[home] : value === null ? plain : GRADED[Math.round(64 * value)];
          pen.fillRect(...box);
          if (graded ? value !== null : device === home) continue;
          pen.fillStyle = hatch;
          pen.fillRect(...box);
          if (graded) continue;
          pen.fillStyle = places[device];
          pen.fillRect(box[0], box[1] + row / 2, box[2], row / 2 - 1);
        }
      }
      if (!cursor) return;
      pen.strokeStyle = Colours.css("ink");
      pen.lineWidth = 2;
      pen.strokeRect(lefts[cursor[1]] - 1, top(cursor[0]) - 1, Math.max(step - gap, 2) + 2, row + 1);
    });

    function numbers(pen, step) {
      const every = 2 ** Math.max(0, Math.ceil(Math.log2(34 / step)));
      pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
      pen.fillStyle = Colours.css("soft");
      pen.fillText("expert", GUTTER, head() - 22);
      for (let i = 0; i < count; i += every) {
        pen.fillText(String(i), left(i), head() - 8);
        pen.fillRect(left(i), head() - 5, 1, 4);
      }
    }

    const under = (event) => {
      const r = experts.layers.findIndex((_, r) => event.offsetY >= top(r) && event.offsetY < top(r) + row);
      const i = Math.floor((event.offsetX - GUTTER) * count / (canvas.clientWidth - GUTTER));
      return r >= 0 && i >= 0 && i < count ? [r, i] : null;
    };
    const go = (r, i) => {
      if (r < 0 || r >= experts.layers.length || i < 0 || i >= count) return;
      cursor = [r, i];
      tell(describe(placement, r, i));
      paint();
    };
    const choose = () => pick(`layers.${experts.layers[cursor[0]]}.experts.${cursor[1]}`);

    canvas.addEventListener("pointermove", (event) => under(event) && tell(describe(placement, ...under(event))));
    canvas.addEventListener("click", (event) => {
      if (!under(event)) return;
      go(...under(event));
      choose();
    });
    canvas.addEventListener("focus", () => go(...(cursor || [0, 0])));
    canvas.addEventListener("keydown", (event) => {
      const [r, i] = cursor;
      const act = {
        ArrowUp: () => go(r - 1, i), ArrowDown: () => go(r + 1, i), ArrowLeft: () => go(r, i - 1), ArrowRight: () => go(r, i + 1),
        Home: () => go(r, 0), End: () => go(r, count - 1), PageUp: () => go(0, i), PageDown: () => go(experts.layers.length - 1, i),
        Enter: choose, " ": choose,
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      act();
      event.preventDefault();
    });

    function show(way) {
      graded = way === "where" ? null : scale(experts, way);
      const bar = Views.make("i", { class: "grades" });
      bar.style.background = `linear-gradient(90deg, ${GRADES.join(", ")})`;
      key.replaceChildren(...(graded ? [graded.low, bar, graded.high] : []));
      key.hidden = !graded;
      paint();
    }

    const sized = new ResizeObserver(paint);
    const themed = Colours.changed(paint);
    sized.observe(canvas);
    return {
      root: Views.make("div", { class: "place-experts" }, canvas, key), show,
      leave() {
        sized.disconnect();
        themed();
      },
    };
  }

  return { WAYS, ways, draw };
})();

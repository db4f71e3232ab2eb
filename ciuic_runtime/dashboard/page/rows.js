"use strict";

// Bars of many lanes as rows of pixels: each row is computed in one pass over the bars that are seen and stretched to its
// height in one call, so that a frame costs the same with a hundred bars and with a hundred thousand.
//   const rows = Rows.of(summary.kinds); rows.begin(width, count, ratio)
//   rows.row(r); rows.bar(x0, x1, kind, share, faded); ...; rows.end(r)   in CSS pixels from the left edge of the chart
//   rows.put(pen, r, x, y, height)
const Rows = (() => {
  const GAP = 0.75; // px between neighbours that are wide enough
  const LEAST = 0.18; // of a pixel: what a bar shows at least, however short
  const FADED = 0.22;
  const WAITS = 0.22; // hatching comes on top

  function of(kinds) {
    const sheet = document.createElement("canvas");
    let pen = null, image = null, pixels = null, ratio = 1;
    let cover = new Float32Array(0), best = cover, light = cover, kind = new Uint8Array(0);
    let palette = null, width = 0;
    const waits = kinds.indexOf("wait");

    function begin(wide, count, pixelRatio) {
      ratio = pixelRatio;
      const need = Math.max(1, Math.round(wide * ratio));
      if (need !== width || !image || image.height !== Math.max(1, count)) {
        width = need;
        sheet.width = width;
        sheet.height = Math.max(1, count);
        pen = sheet.getContext("2d");
        image = pen.createImageData(width, Math.max(1, count));
        pixels = new Uint32Array(image.data.buffer);
        cover = new Float32Array(width);
        best = new Float32Array(width);
        light = new Float32Array(width);
        kind = new Uint8Array(width);
      }
      palette ??= Uint32Array.from(kinds, (name) => {
        const [r, g, b] = Colours.rgb(name);
        return (b << 16) | (g << 8) | r;
      });
    }

    function row() {
      cover.fill(0);
      best.fill(0);
    }

    function bar(x0, x1, which, share, faded) {
      const from = Math.max(0, x0 * ratio);
      let to = Math.min(width, x1 * ratio);
      if (to - from > 4) to -= GAP * ratio;
      const first = Math.floor(from), last = Math.min(width - 1, Math.ceil(to) - 1);
      const strength = (faded ? FADED : 1) * (which === waits ? WAITS : 1);
      if (last <= first) {
        if (first < width) add(first, Math.max(LEAST, (to - from) * share), which, strength);
        return;
      }
      add(first, (first + 1 - from) * share, which, strength);
      for (let p = first + 1; p < last; p++) add(p, share, which, strength);
      add(last, (to - last) * share, which, strength);
    }

    function add(p, amount, which, strength) {
      cover[p] += amount;
      if (amount <= best[p]) return;
      best[p] = amount;
      kind[p] = which;
      light[p] = strength;
    }

    function end(r) {
      const base = r * width;
      for (let p = 0; p < width; p++) {
        const alpha = cover[p] > 0 ? Math.min(1, cover[p]) * light[p] * 255 : 0;
        pixels[base + p] = (palette[kind[p]] | (alpha << 24)) >>> 0;
      }
    }

    function put(target, r, x, y, height) {
      target.drawImage(sheet, 0, r, width, 1, x, y, width / ratio, height);
    }

    return { begin, row, bar, end, put, flush: () => pen.putImageData(image, 0, 0), recolour: () => { palette = null; } };
  }

  return { of };
})();

"use strict";

// Numbers as people read them, always with their unit. null and undefined are "–".
//   Units.seconds(0.0121) "12.1 ms"      Units.time(1.2345, 0.001) "1.235 s": with digits for a grid of 0.001 s
//   Units.bytes(12345678) "11.8 MiB"     as format_bytes in devices/units.py
//   Units.rate(4.52e10, "B/s") "45.2 GB/s"; Units.rate(31.4, "tokens/s") "31.4 tokens/s"
//   Units.percent(0.123) "12 %"; Units.change(0.123) "+12 %"; Units.times(3.4) "3.4x"
//   Units.count(1234567) "1,234,567"; Units.number(1234567, "parameter") "1,234,567 parameters"
const Units = (() => {
  const none = (value) => value === null || value === undefined || Number.isNaN(value);

  // Three digits that say something: 0.0123, 1.23, 12.3, 123, 1234.
  function figures(value) {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 99.95) return value.toFixed(0);
    const text = value.toPrecision(3);
    return text.includes("e") ? String(Number(text)) : text;
  }

  function seconds(s) {
    if (none(s)) return "–";
    const size = Math.abs(s);
    if (size === 0) return "0 s";
    if (size < 0.9995e-6) return `${figures(s * 1e9)} ns`;
    if (size < 0.9995e-3) return `${figures(s * 1e6)} µs`;
    if (size < 0.9995) return `${figures(s * 1e3)} ms`;
    if (size < 119.5) return `${figures(s)} s`;
    if (size < 7200) return `${(s / 60).toFixed(1)} min`;
    if (size < 172800) return `${(s / 3600).toFixed(1)} h`;
    return `${(s / 86400).toFixed(1)} days`;
  }

  // A point in time, with as many digits as tell apart times that are `grid` s apart.
  function time(s, grid) {
    if (none(s)) return "–";
    if (Math.abs(s) < grid / 1000) return "0";
    const [scale, unit] = Math.abs(s) >= 1 ? [1, "s"] : Math.abs(s) >= 1e-3 ? [1e-3, "ms"] : [1e-6, "µs"];
    const digits = Math.min(9, Math.max(0, Math.ceil(-Math.log10(grid / scale) - 1e-9)));
    return `${(s / scale).toFixed(digits)} ${unit}`;
  }

  function bytes(n) {
    if (none(n)) return "–";
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (Math.abs(n) < 1024) return `${unit === "B" || n >= 1000 ? n.toFixed(0) : Number(n.toPrecision(3))} ${unit}`;
      n /= 1024;
    }
    return `${Number(n.toPrecision(4))} TiB`;
  }

  function rate(value, unit) {
    if (none(value)) return "–";
    if (unit === "tokens/s" && Math.abs(value) < 1e6) return `${figures(value)} ${unit}`;
    for (const prefix of ["", "k", "M", "G", "T"]) {
      if (Math.abs(value) < 1000) return `${Number(value.toPrecision(3))} ${prefix}${unit}`;
      value /= 1000;
    }
    return `${Number(value.toPrecision(3))} P${unit}`;
  }

  function percent(share) {
    if (none(share)) return "–";
    const value = share * 100;
    if (value && Math.abs(value) < 0.05) return value > 0 ? "<0.1 %" : ">−0.1 %";
    const small = Math.abs(value) < 10 && value !== 0 && Math.abs(value) !== Math.round(Math.abs(value));
    return `${small ? value.toFixed(1) : value.toFixed(0)} %`;
  }

  const change = (share) => (none(share) ? "–" : `${share > 0 ? "+" : share < 0 ? "−" : "±"}${percent(Math.abs(share))}`);
  const times = (factor) => (none(factor) ? "–" : `${factor >= 10 ? factor.toFixed(0) : Number(factor.toPrecision(2))}x`);
  const count = (n) => (none(n) ? "–" : n.toLocaleString("en-US"));
  const number = (n, noun, many = `${noun}s`) => `${count(n)} ${n === 1 ? noun : many}`;

  return { seconds, time, bytes, rate, percent, change, times, count, number, figures };
})();

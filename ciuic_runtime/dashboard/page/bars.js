"use strict";

// The steps of a recording as the strip has them: columns of bars, of one step each or, in a long recording, of several,
// which show the longest of them. Knows what is usual and what is slow; nothing of how it is drawn.
//   const bars = Bars.of(); bars.set(columns), bars.add(columns), bars.refine(columns) with answers of GET steps
//   bars.columns, bars.total (s), bars.size, bars.begin and bars.end (step numbers, end exclusive); bars.at(step) -> index
//   bars.slow(i), bars.slowest(most), bars.usual, bars.shared(from, to) -> [from, to] to be asked for, or null
const Bars = (() => {
  const SLOW = 1.6; // times the median of its phase
  const RECENT = 4000; // bars that the medians are of

  function of() {
    let columns = blank(), total = [];
    let usual = { decode: 0, prefill: 0 }; // s per step of decode, s per token of prefill

    function blank() {
      return { first: [], last: [], start: [], end: [], phase: [], tokens: [], worst: [], seconds: [], planned: [] };
    }

    const size = () => columns.first.length;
    const sum = (parts) => parts.reduce((all, part) => all + part, 0);

    function set(given) {
      columns = blank();
      total = [];
      add(given);
    }

    function add(given) {
      const known = columns.last.at(-1) ?? -1;
      for (let i = 0; i < given.first.length; i++) {
        if (given.first[i] <= known) continue; // seen already
        for (const name of Object.keys(columns)) columns[name].push(given[name][i]);
        total.push(sum(given.seconds[i]));
      }
      usual = { decode: median("decode", (i) => total[i]), prefill: median("prefill", (i) => total[i] / columns.tokens[i]) };
    }

    // Finer bars in the place of those that several steps share. They have to begin and end where those do.
    function refine(given) {
      if (!given.first.length) return;
      const low = at(given.first[0]), high = at(given.last.at(-1)) + 1;
      if (low < 0 || high < 1 || columns.first[low] !== given.first[0] || columns.last[high - 1] !== given.last.at(-1)) return;
      for (const name of Object.keys(columns)) columns[name].splice(low, high - low, ...given[name]);
      total.splice(low, high - low, ...given.seconds.map(sum));
    }

    function shared(from, to) {
      const low = near(from), high = Math.min(size() - 1, near(to));
      for (let i = low; i <= high; i++) if (columns.first[i] !== columns.last[i]) return [columns.first[low], columns.last[high]];
      return null;
    }

    function median(phase, value) {
      const found = [];
      for (let i = Math.max(0, size() - RECENT); i < size(); i++) if (columns.phase[i] === phase) found.push(value(i));
      found.sort((a, b) => a - b);
      return found[found.length >> 1] || 0;
    }

    // Took much longer than is usual for its phase; among less than four nothing is usual.
    function slow(i) {
      if (size() < 4) return false;
      const value = columns.phase[i] === "prefill" ? total[i] / columns.tokens[i] : total[i];
      return value > SLOW * usual[columns.phase[i]];
    }

    // The longest first, of prompts only where there is no other step: those that were slow or, where none was, `most` of all.
    function slowest(most) {
      const all = Array.from(total, (_, i) => i), tokens = all.filter((i) => columns.phase[i] === "decode");
      const found = tokens.length ? tokens : all, late = found.filter(slow);
      return (late.length ? late : found).sort((a, b) => total[b] - total[a]).slice(0, most)
        .map((i) => ({
          step: columns.worst[i], seconds: total[i], slow: slow(i), usual: columns.phase[i] === "decode" ? usual.decode : null,
        }));
    }

    // The first bar that ends with that step or after it: by bisection, since bars are in order.
    function near(step) {
      let low = 0, high = size();
      while (low < high) {
        const middle = (low + high) >> 1;
        if (columns.last[middle] < step) low = middle + 1; else high = middle;
      }
      return low;
    }

    function at(step) {
      const place = near(step);
      return place < size() && columns.first[place] <= step ? place : -1;
    }

    return {
      set, add, refine, shared, slow, slowest, at, near,
      get columns() { return columns; },
      get total() { return total; },
      get size() { return size(); },
      get begin() { return columns.first[0] ?? 0; },
      get end() { return (columns.last.at(-1) ?? -1) + 1; },
      get usual() { return usual; },
    };
  }

  return { of };
})();

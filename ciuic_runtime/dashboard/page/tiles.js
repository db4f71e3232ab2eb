"use strict";

// Events of a recording by level of detail: fetched when they come into view, kept in a bounded cache, newest use last.
// A tile (level, index) covers [index * 2^level, (index + 1) * 2^level) ns and is kept as typed arrays.
//   const tiles = Tiles.of(summary, came): came(tile) is called when one came, came(null) when it is time to look again
//   tiles.cover(from, to, nsPerPixel): pieces [{tile, from, to}] in time order, of the right level or, while that loads,
//     of a coarser or finer one; asks for what is missing
//   tile.lanes: Map of a lane's name to its columns
//   tiles.added(since): events came, none of which begins before `since` ns; tiles.state; tiles.close()
const Tiles = (() => {
  const FINEST = 10; // level: a tile of 1 us, as the server has them
  const WIDE = 500; // pixels that a tile covers at least; at most twice that
  const MOST_BARS = 600_000; // kept in all
  const AT_ONCE = 3; // requests
  const COARSER = 8; // levels tried when a tile is missing
  const RETRY = 5000; // ms until one that failed is asked for again
  const GROWS = 500; // ms

  // A tile's answer as columns of numbers, with times in ns since the recording began.
  function unpack(answer, begin, kinds) {
    const kindOf = answer.kinds.map((name) => Math.max(0, kinds.indexOf(name)));
    const lanes = new Map();
    let bars = 0;
    for (const lane of answer.lanes) {
      const size = lane.from.length;
      const one = {
        from: new Float64Array(size), to: new Float64Array(size), task: Int32Array.from(lane.task),
        kind: new Uint8Array(size), busy: Float32Array.from(lane.busy), count: Uint32Array.from(lane.count),
        step: Int32Array.from(lane.step), bytes: Float64Array.from(lane.bytes),
      };
      for (let i = 0; i < size; i++) {
        one.from[i] = begin + lane.from[i];
        one.to[i] = begin + lane.to[i];
        one.kind[i] = kindOf[lane.kind[i]];
      }
      lanes.set(lane.lane, one);
      bars += size;
    }
    return { lanes, tasks: answer.tasks, labels: answer.tasks.map((name) => name.replace(/^layers\./, "")), bars };
  }

  function of(summary, came) {
    const cache = new Map(); // key -> tile
    const asked = new Map(); // key -> {stop: AbortController, end (ns), old}
    const failed = new Map(); // key -> when
    let wanted = []; // [level, index], the most wanted first
    let bars = 0;
    let timer = null;
    let closed = false;

    const key = (level, index) => `${level}/${index}`;
    const now = () => summary.seconds * 1e9;

    function cover(from, to, nsPerPixel) {
      const fine = Math.max(FINEST, Math.ceil(Math.log2(WIDE * nsPerPixel)));
      const last = Math.min(to, now());
      const pieces = [];
      wanted = [];
      let level = fine, index = 0;
      for (let at = Math.max(0, from); at <= last; at = (index + 1) * 2 ** level) {
        [level, index] = there(fine, Math.floor(at / 2 ** fine));
        const found = known(level, index);
        if (!found || stale(found)) wanted.push([level, index]);
        if (found) pieces.push({ tile: found, from: index * 2 ** level, to: (index + 1) * 2 ** level });
        else instead(level, index, pieces);
      }
      // Neighbours are asked for last, so that panning finds them.
      for (const next of [Math.floor(last / 2 ** fine) + 1, Math.floor(Math.max(0, from) / 2 ** fine) - 1])
        if (next >= 0 && next * 2 ** fine < now() && !cache.has(key(fine, next)) && Data.has(`tiles/${key(fine, next)}`))
          wanted.push([fine, next]);
      ask();
      return pieces;
    }

    // A saved page has some levels only: the finest there is that covers it.
    function there(level, index) {
      for (let up = 0; up < 60 - level; up++) {
        const found = [level + up, Math.floor(index / 2 ** up)];
        if (Data.has(`tiles/${key(...found)}`)) return found;
      }
      return [level, index];
    }

    // Events are recorded when a step ends, and may have begun long before: an old tile is one that lacks some, or may. It
    // is shown until a new one has come, which is asked for when it is seen, twice a second at most.
    function added(since) {
      for (const one of [...cache.values(), ...asked.values()]) if (one.end > since) one.old = true;
    }

    function stale(tile) {
      if (!tile.old) return false;
      const early = tile.came + GROWS - performance.now();
      if (early > 0) timer ??= setTimeout(() => { timer = null; came(null); }, early);
      return early <= 0;
    }

    function known(level, index) {
      const name = key(level, index);
      const found = cache.get(name);
      if (!found) return null;
      cache.delete(name); // used last
      cache.set(name, found);
      return found;
    }

    function instead(level, index, pieces) {
      const size = 2 ** level;
      for (let up = 1; up <= COARSER; up++) {
        const found = cache.get(key(level + up, Math.floor(index / 2 ** up)));
        if (found) return pieces.push({ tile: found, from: index * size, to: (index + 1) * size });
      }
      for (let half = 0; half < 2; half++) {
        const found = cache.get(key(level - 1, 2 * index + half));
        if (found) pieces.push({ tile: found, from: index * size + half * size / 2, to: index * size + (half + 1) * size / 2 });
      }
      return pieces;
    }

    function ask() {
      const names = new Set(wanted.map(([level, index]) => key(level, index)));
      for (const [name, asking] of asked) if (!names.has(name)) asking.stop.abort();
      for (const [level, index] of wanted) {
        if (asked.size >= AT_ONCE) return;
        const name = key(level, index);
        if (!asked.has(name) && !(performance.now() < failed.get(name) + RETRY)) load(level, index, name);
      }
    }

    async function load(level, index, name) {
      const begin = index * 2 ** level, end = begin + 2 ** level;
      const asking = { stop: new AbortController(), end, old: false };
      let tile = null;
      asked.set(name, asking);
      try {
        const answer = await Data.get(`tiles/${level}/${index}`, { signal: asking.stop.signal });
        if (closed) return;
        tile = { ...unpack(answer, begin, summary.kinds), end, old: asking.old, came: performance.now() };
        put(name, tile);
      } catch (error) {
        if (error.name !== "AbortError") {
          failed.set(name, Data.saved ? Infinity : performance.now());
          if (!Data.saved && !closed) Views.tell(error, () => came(null));
        }
      } finally {
        asked.delete(name);
        if (!closed) came(tile);
      }
    }

    function put(name, tile) {
      bars += tile.bars - (cache.get(name)?.bars || 0);
      cache.delete(name);
      cache.set(name, tile);
      for (const [oldest, one] of cache) {
        if (bars <= MOST_BARS || cache.size <= 8) break;
        cache.delete(oldest);
        bars -= one.bars;
      }
    }

    return {
      cover, added,
      get state() { return { tiles: cache.size, bars, asked: asked.size, wanted: wanted.length }; },
      close() {
        closed = true;
        clearTimeout(timer);
        for (const asking of asked.values()) asking.stop.abort();
      },
    };
  }

  return { of };
})();

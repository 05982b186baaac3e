// The fleet over time: what each executor did since the last snapshots, and what happened between two of them.

import { some } from "./numbers.js";

const WINDOW_S = 5;
const GONE_S = 30;

/**
 * What the pages know of the executors. Two schedulers that share an executor both tell of it: their requests and tokens add
 * up, and of its phase the better one counts.
 */
export class Fleet {
  constructor() {
    this._executors = new Map();
    this._schedulers = new Map();
  }

  /** Take a snapshot. Returns the executors, each with `rate` (tokens per second), and texts of what happened. */
  take(snapshot) {
    const happened = [];
    const moved = this._takeSchedulers(snapshot, happened);
    const seen = merged(snapshot);
    const heard = snapshot.schedulers.some((scheduler) => !scheduler.error);
    for (const [address, now] of seen) {
      const before = this._executors.get(address);
      if (before === undefined) {
        this._executors.set(address, { now, tokens: [[snapshot.at, now.tokens]], goneAt: null });
        continue;
      }
      this._tell(before, now, moved, happened);
      before.goneAt = null;
      // While it is not connected it tells no model.
      before.now = { ...now, model: now.model || before.now.model };
      const last = before.tokens.at(-1);
      // One that was forgotten and comes back counts from 0.
      if (now.tokens < last[1]) before.tokens = [];
      before.tokens.push([snapshot.at, now.tokens]);
      while (before.tokens.length > 2 && before.tokens[0][0] < snapshot.at - WINDOW_S) before.tokens.shift();
    }
    for (const [address, known] of this._executors) {
      if (seen.has(address) || !heard) continue;
      if (known.goneAt === null) {
        known.goneAt = snapshot.at;
        happened.push(`Executor ${address} was taken off the list.`);
        known.now = { ...known.now, phase: "gone", running: 0 };
      } else if (known.goneAt < snapshot.at - GONE_S) {
        this._executors.delete(address);
      }
    }
    const executors = [...this._executors.values()].map(({ now, tokens }) => ({ ...now, rate: rate(tokens) }));
    return { executors: executors.sort((a, b) => a.address.localeCompare(b.address, "en", { numeric: true })), happened };
  }

  /** Returns how many requests moved off executors since the last snapshot. */
  _takeSchedulers(snapshot, happened) {
    let moved = 0;
    const here = new Set();
    for (const scheduler of snapshot.schedulers) {
      here.add(scheduler.address);
      const before = this._schedulers.get(scheduler.address);
      if (before !== undefined) {
        if (scheduler.error && !before.error) happened.push(`Scheduler ${scheduler.address} is lost: ${scheduler.error}`);
        if (!scheduler.error && before.error) happened.push(`Scheduler ${scheduler.address} is back.`);
        if (scheduler.draining && !before.draining) happened.push(`Scheduler ${scheduler.address} is draining.`);
        // Another incarnation counts from 0.
        if (!scheduler.error && scheduler.instance_id === before.instance_id) moved += scheduler.resubmitted - before.resubmitted;
      }
      this._schedulers.set(scheduler.address, scheduler.error ? { ...before, error: scheduler.error } : scheduler);
    }
    for (const address of this._schedulers.keys()) if (!here.has(address)) this._schedulers.delete(address);
    return moved;
  }

  _tell({ now: before }, now, moved, happened) {
    if (before.phase !== now.phase) {
      const why = now.phase === "connecting" && now.last_error ? `: ${now.last_error}` : "";
      const words = { ready: "is ready", draining: "is draining", connecting: "is lost", incompatible: "is refused" };
      const left = before.phase === "ready" && moved > 0 ? ` ${some(moved, "request")} moved to others.` : "";
      happened.push(`Executor ${now.address} ${words[now.phase] ?? now.phase}${why}.${left}`);
    } else if (before.instance_id && now.instance_id && before.instance_id !== now.instance_id) {
      happened.push(`Executor ${now.address} was started again.${moved > 0 ? ` ${some(moved, "request")} moved.` : ""}`);
    }
  }
}

const ORDER = ["ready", "draining", "incompatible", "connecting"];

function merged(snapshot) {
  const found = new Map();
  for (const scheduler of snapshot.schedulers) {
    for (const executor of scheduler.executors ?? []) {
      const other = found.get(executor.address);
      if (other === undefined) {
        found.set(executor.address, { ...executor, schedulers: [scheduler.address] });
        continue;
      }
      const better = ORDER.indexOf(executor.phase) < ORDER.indexOf(other.phase) ? executor : other;
      found.set(executor.address, {
        ...better,
        running: executor.running + other.running,
        tokens: executor.tokens + other.tokens,
        schedulers: [...other.schedulers, scheduler.address],
      });
    }
  }
  return found;
}

function rate(tokens) {
  const [first, last] = [tokens[0], tokens.at(-1)];
  return first && last[0] > first[0] ? (last[1] - first[1]) / (last[0] - first[0]) : null;
}

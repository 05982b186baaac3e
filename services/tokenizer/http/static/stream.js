// One answer as a stream that survives what happens to the connection: a request that the server keeps is gone on with behind
// the last event that came, also after a reload of the page.

import { ApiError, events, request, sleep } from "./api.js";

const PATIENCE = 120_000;
const LONGEST_WAIT = 5_000;

/**
 * Yields the chunks of an answer. Throws ApiError, and TypeError where the server cannot be reached for long.
 *
 * @param asked {path, body}; the body has stream, request_id and on_disconnect: keep.
 * @param signal Ends it.
 * @param resumed The request began earlier: begin with its first token, and never run it anew.
 * @param onWait Told why nothing comes, and "" once something does again.
 */
export async function* chunks({ path, body }, { signal, resumed = false, onWait = () => {} }) {
  // "From no token on": all of the answer again, or 404 where it is not kept any more.
  let lastId = resumed ? `${body.request_id}/0` : null;
  let has_begun = false;
  let lastProgress = Date.now();
  for (let failures = 0; ; failures++) {
    try {
      const headers = lastId === null ? {} : { "last-event-id": lastId };
      const response = await request(path, { method: "POST", body, headers, signal });
      for await (const { id, data } of events(response)) {
        if (failures) onWait("");
        failures = 0;
        has_begun = true;
        lastProgress = Date.now();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(0, chunk.error);
        yield chunk;
        if (id !== null) lastId = id; // only now: what was not taken is asked for again
      }
      throw new TypeError("the connection ended before the answer did");
    } catch (error) {
      if (signal.aborted) throw signal.reason;
      const is_passing = error instanceof ApiError ? error.isPassing : error instanceof TypeError;
      // What has begun and has no ids is not kept: asking again would be another answer. And a full queue is told.
      const may_go_on = lastId !== null || (!has_begun && !(error instanceof ApiError));
      if (!is_passing || !may_go_on || Date.now() - lastProgress > PATIENCE) throw error;
      onWait(`${error.message}; trying again`);
      await sleep(error.retryAfterMs ?? Math.min(LONGEST_WAIT, 250 * 2 ** failures), signal);
    }
  }
}

/** End a kept request, wherever it runs. */
export async function cancel(requestId) {
  await request(`v1/requests/${encodeURIComponent(requestId)}/cancel`, { method: "POST" });
}

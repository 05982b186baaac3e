// Executes a sequence of recorded calls in one call.
#include "recording.h"

struct RecordedCall {
  RecordedFunction function;
  const Argument* arguments;
};

// Returns kDone, or the index of the call that rejected its inputs; the calls after it are not executed.
EXPORT int64_t replay(const RecordedCall* calls, int64_t count, int64_t threads) {
  for (int64_t i = 0; i < count; ++i) {
    if (calls[i].function(calls[i].arguments, threads) != kDone) return i;
  }
  return kDone;
}

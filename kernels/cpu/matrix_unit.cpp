#include "matrix_unit.h"

#include "vec.h"

#if defined(HAS_MATRIX_UNIT)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Requests from the operating system that it saves the state of the matrix unit (AMX), for all threads of this process.
// Returns 1, or 0 if the request is refused.
EXPORT int64_t prepare() {
#if defined(HAS_MATRIX_UNIT)
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return 1;
#endif
}

#include "matrix_unit.h"

#include "vec.h"

#if defined(HAS_MATRIX_UNIT)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Asks the operating system to keep the state of matrix units, for all threads of this process. Returns 1, or 0 where
// it refuses.
EXPORT int64_t prepare() {
#if defined(HAS_MATRIX_UNIT)
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return 1;
#endif
}

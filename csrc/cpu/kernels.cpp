#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pnlac {
namespace isa_default { extern const Kernels kTable; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const Kernels kTable; }
namespace isa_avx512 { extern const Kernels kTable; }
#endif

namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("PNLAC_ISA");
  const auto fits = [&](const Kernels& table) { return !wanted || std::strcmp(wanted, table.isa) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && fits(isa_avx512::kTable))
    return isa_avx512::kTable;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      fits(isa_avx2::kTable))
    return isa_avx2::kTable;
#endif
  if (fits(isa_default::kTable)) return isa_default::kTable;
  throw std::runtime_error("PNLAC_ISA=" + std::string(wanted) +
                           " is not an instruction set of this processor: default, avx2 or avx512.");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace pnlac

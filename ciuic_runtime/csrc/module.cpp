// The operators' CPU kernels as one Python module; each source file binds its own.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_fp8(nb::module_& m);
void bind_operators(nb::module_& m);
void bind_pack(nb::module_& m);
void bind_rms_norm(nb::module_& m);

NB_MODULE(_kernels, m) {
    bind_fp8(m);
    bind_operators(m);
    bind_pack(m);
    bind_rms_norm(m);
}

#include <nanobind/nanobind.h>
NB_MODULE(_probe, m) {}

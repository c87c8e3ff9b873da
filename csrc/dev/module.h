// What the files of the development module share. Each stem has one function here that binds its kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace pyeff::dev {

// Both throw ValueError.
Isa isa_named(const std::string& name);
int checked_threads(int threads);

void bind_linear(pybind11::module_& m);
void bind_read(pybind11::module_& m);

}  // namespace pyeff::dev

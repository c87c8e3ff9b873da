// What the files of the development module share. Each stem has one function here that binds its kernels.
#pragma once

#include <string>

#include "cpu/isa.h"

namespace pyeff::dev {

// Both throw ValueError.
Isa isa_named(const std::string& name);
int checked_threads(int threads);

}  // namespace pyeff::dev

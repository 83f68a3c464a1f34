// The headers that every kernel needs. Included before isa.h, so that no standard template is instantiated for one
// instruction set and linked into another.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

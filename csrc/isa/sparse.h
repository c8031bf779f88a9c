// SPDX-License-Identifier: Apache-2.0
// Contracts of the kernels that each level compiles.
#pragma once
#include "sparse/search_kernels.h"
#include "sparse/splade_kernels.h"

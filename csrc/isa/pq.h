// SPDX-License-Identifier: Apache-2.0
// Contracts of the kernels that each level compiles.
#pragma once
#include "pq/assign_kernels.h"
#include "pq/code_scan_kernels.h"
#include "pq/lookup_kernels.h"
#include "pq/product_keys_kernels.h"

// SPDX-License-Identifier: Apache-2.0
// Everything that the per-level units include, at global scope. Contracts and intrinsics only: a
// standard container or any other inline function would be compiled once per level under one name,
// and the linker might keep the AVX-512 copy for everybody.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/tensor_view.h"

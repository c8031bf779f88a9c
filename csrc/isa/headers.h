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

#include "attention/attention_kernels.h"
#include "hamming/hamming_kernels.h"
#include "scan/causal_conv_kernels.h"
#include "scan/few_rows_linear_kernels.h"
#include "scan/matrix_scan_kernels.h"
#include "scan/matrix_steps_kernels.h"
#include "scan/matrix_update_kernels.h"
#include "scan/scan2d_kernels.h"
#include "scan/scan_kernels.h"
#include "scan/state_update_kernels.h"
#include "scan/wavefront_kernels.h"

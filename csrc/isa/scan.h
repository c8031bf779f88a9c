// SPDX-License-Identifier: Apache-2.0
// Contracts of the kernels that each level compiles.
#pragma once
#include "scan/causal_conv_kernels.h"
#include "scan/few_rows_linear_kernels.h"
#include "scan/matrix_scan_kernels.h"
#include "scan/matrix_steps_kernels.h"
#include "scan/matrix_update_kernels.h"
#include "scan/scan2d_kernels.h"
#include "scan/scan_kernels.h"
#include "scan/state_update_kernels.h"
#include "scan/wavefront_kernels.h"

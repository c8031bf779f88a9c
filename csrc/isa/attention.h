// SPDX-License-Identifier: Apache-2.0
// Contracts of the kernels that each level compiles.
#pragma once
#include "attention/attention_kernels.h"

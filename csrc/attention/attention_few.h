// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attention/attention.h"

namespace pentad::attention {

// Whether so few queries share a KV head that reading the keys, once, is all that counts.
bool serves_few(const Problem&);
void forward_few(const Problem&, const Outputs&);

}  // namespace pentad::attention

// SPDX-License-Identifier: Apache-2.0
namespace pentad::sparse {}  // namespace pentad::sparse

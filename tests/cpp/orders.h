// SPDX-License-Identifier: Apache-2.0
// Runs tests of CUDA kernels with the lanes in every kind of order, so that a race shows.
#pragma once
#include "common/cuda_host/executor.h"

template <class Test>
void in_every_order(const Test& test) {
  using pentad::cuda_host::Order;
  for (Order order : {Order::forward, Order::reverse, Order::shuffled}) {
    pentad::cuda_host::schedule.order = order;
    test();
  }
}

// SPDX-License-Identifier: Apache-2.0
// Runs tests of CUDA kernels with the lanes in every kind of order, so that a race shows. Under the
// address sanitizer, which is there for accesses, one order has to do.
#pragma once
#include "common/cuda_host/executor.h"

template <class Test>
void in_every_order(const Test& test) {
  using pentad::cuda_host::Order;
#if defined(__SANITIZE_ADDRESS__)
  const Order orders[] = {Order::shuffled};
#else
  const Order orders[] = {Order::forward, Order::reverse, Order::shuffled};
#endif
  for (Order order : orders) {
    pentad::cuda_host::schedule.order = order;
    pentad::cuda_host::schedule.early_copies = order == Order::reverse;
    test();
  }
}

// Mean and sum of squared deviations of a set, mergeable (Chan, Golub and LeVeque, 1983).
#pragma once

#include "shared/activation.h"

namespace fastgen {

template <class A>
struct Moments {
  A count = 0, mean = 0, m2 = 0;

  FASTGEN_HD void merge(const Moments& other) {
    if (other.count == 0) return;
    const A total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * other.count / total);
    count = total;
  }
};

}  // namespace fastgen

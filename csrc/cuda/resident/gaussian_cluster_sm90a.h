// What the functions of chain.h call for chains of Gaussian visible units in a cluster.
#pragma once

#include "cuda/resident/chain.h"

namespace rbm::cuda {

// Whether a cluster of `cluster` blocks holds the weights and 64 chains.
bool gaussian_chain_fits(int n_visible, int n_hidden, int digits, int cluster, int shared_bytes);
// Tells how many clusters of `cluster` blocks the device runs at a time; returns a cudaError_t.
int gaussian_chain_clusters(int digits, int cluster, int shared_bytes, int& clusters);
int gaussian_chain_sm90a(const Chain& a, int digits, int cluster, int shared_bytes,
                         cudaStream_t stream);

}  // namespace rbm::cuda

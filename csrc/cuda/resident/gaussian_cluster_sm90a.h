// The part of chain_sm90a's functions that runs Gaussian visible units.
#pragma once

#include "cuda/resident/chain.h"

namespace rbm::cuda {

// Whether a cluster of so many blocks holds the weights and 64 chains.
bool gaussian_chain_fits(int n_visible, int n_hidden, int digits, int cluster, int shared_bytes);
// How many clusters of so many blocks the device runs at a time; a cudaError_t.
int gaussian_chain_clusters(int digits, int cluster, int shared_bytes, int& clusters);
int gaussian_chain_sm90a(const Chain& a, int digits, int cluster, int shared_bytes,
                         cudaStream_t stream);

}  // namespace rbm::cuda

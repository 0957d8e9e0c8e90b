// SPDX-License-Identifier: Apache-2.0
// Sampled attention for one decode step on the device: hash the query, draw candidates, attend.
#pragma once

// The map, a step being four kernels in the order of the host's stream. By signatures:
//
//   hash        signature_scores.cuh   partial sums of the queries, scores of codes
//               rotation.cuh
//   rule        pilot.cuh              from some blocks' scores the probabilities of all
//   candidates  signature_attention.cuh  a scan that draws, and at once reads what it drew
//   index       signatures.cuh         codes of the keys, made and kept on the device
//
// by hash tables:
//
//   hash        sign_planes.cuh        codes of the queries, and of keys by cuBLAS (key_hasher.cuh)
//   candidates  collisions.cuh         tokens that collide with a query often enough
//   attend      table_attention.cuh    reads them, and weighs each as its cosine says
//   index       bucket_tables.cuh      tables of the keys, sorted by CUB
//
// and for both:
//
//   attend      group_attention.cuh    one softmax over drawn and exact tokens
//               exact_attention.cuh    a step that reads every token
//   state       decode.cuh             plan, requests; outputs and lse of the parts' sums
//   cache       key_values.cuh         the host's keys and values, at strides or on pages
//
// Which tokens signatures draw, and with which probabilities, is settled in integers: they are
// those that magicpig::decode() draws with Poisson, for the same keys, queries and seeds. Tables
// are those of magicpig::BucketTables but for codes of keys and queries whose projection is within
// rounding of a plane.

#include "magicpig/cuda/exact_attention.cuh"
#include "magicpig/cuda/signature_attention.cuh"
#include "magicpig/cuda/table_attention.cuh"

// SPDX-License-Identifier: Apache-2.0
// Selections that others publish, each with its index: Quest, SOCKET, learned codes, Double
// Sparsity, IVF.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "compare/methods.hpp"
#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/sample/agreement_scores.hpp"
#include "magicpig/sample/cluster_scores.hpp"
#include "magicpig/sample/label_scores.hpp"
#include "magicpig/sample/page_scores.hpp"
#include "magicpig/sample/soft_collisions.hpp"
#include "magicpig/sample/top_k.hpp"

namespace magicpig::bench {

// Pages of 16, 32 and 64 tokens at every budget.
std::vector<Setting> quest_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  for (const int page : {16, 32, 64}) {
    for (const double fraction : rows) {
      std::array<char, 32> label;
      (void)std::snprintf(label.data(), label.size(), "page=%d rows=%g", page, fraction);
      const auto run = [page, fraction](Trial& trial) {
        const auto pages = trial.workbench().pages(page, trial.seed());
        if (!pages.ok()) return pages.status();
        trial.note_index_bytes((*pages)->index->bytes());
        const auto sampler =
            Quest::create({.fraction = fraction}, PageScores((*pages)->index->dim()));
        if (!sampler.ok()) return sampler.status();
        return trial.decode(*sampler, *(*pages)->index);
      };
      settings.push_back({.label = label.data(), .random = false, .run = run});
    }
  }
  return settings;
}

// 60 tables at every budget, as published and of centred keys.
std::vector<Setting> socket_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  const auto add = [&](int bits, bool centred) {
    for (const double fraction : rows) {
      std::array<char, 64> label;
      (void)std::snprintf(label.data(), label.size(), "%sK=%d L=60 rows=%g",
                          centred ? "centred " : "", bits, fraction);
      const auto run = [=](Trial& trial) {
        const auto hashed = trial.workbench().hash_codes(bits, 60, centred, trial.seed());
        if (!hashed.ok()) return hashed.status();
        trial.note_index_bytes((*hashed)->index->bytes());
        const auto scores = SoftCollisions<SimHash>::create(*(*hashed)->family);
        if (!scores.ok()) return scores.status();
        const auto sampler = TopK<SoftCollisions<SimHash>>::create({.fraction = fraction}, *scores);
        if (!sampler.ok()) return sampler.status();
        return trial.decode(*sampler, *(*hashed)->index);
      };
      settings.push_back({.label = label.data(), .run = run});
    }
  };
  add(8, false);
  add(10, false);
  add(10, true);
  return settings;
}

// Codes of a trained file at every budget, each head by its own bits, and by those of its group.
std::vector<Setting> learned_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  for (const bool group_sum : {false, true}) {
    for (const double fraction : rows) {
      std::array<char, 32> label;
      (void)std::snprintf(label.data(), label.size(), "%srows=%g", group_sum ? "group " : "",
                          fraction);
      const auto run = [group_sum, fraction](Trial& trial) {
        const auto learned = trial.workbench().learned(trial.seed());
        if (!learned.ok()) return learned.status();
        trial.note_index_bytes((*learned)->index->bytes());
        const AgreementScores scores(*(*learned)->hash, group_sum);
        const auto sampler = TopK<AgreementScores>::create({.fraction = fraction}, scores);
        if (!sampler.ok()) return sampler.status();
        return trial.decode(*sampler, *(*learned)->index);
      };
      settings.push_back({.label = label.data(), .random = false, .run = run});
    }
  }
  return settings;
}

// Labels of 8, 16 and 32 channels at every budget, calibrated on keys and with queries.
std::vector<Setting> double_sparsity_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  for (const bool by_queries : {false, true}) {
    for (const int wanted : {8, 16, 32}) {
      for (const double fraction : rows) {
        std::array<char, 64> label;
        (void)std::snprintf(label.data(), label.size(), "%schannels=%d rows=%g",
                            by_queries ? "queries " : "", wanted, fraction);
        const auto run = [=](Trial& trial) {
          const int channels = std::min(wanted, trial.workbench().capture().shape().head_dim);
          const auto labels = trial.workbench().labels(channels, by_queries, trial.seed());
          if (!labels.ok()) return labels.status();
          trial.note_index_bytes((*labels)->index->bytes());
          const auto sampler =
              DoubleSparsity::create({.fraction = fraction}, LabelScores(channels));
          if (!sampler.ok()) return sampler.status();
          return trial.decode(*sampler, *(*labels)->index);
        };
        settings.push_back({.label = label.data(), .random = false, .run = run});
      }
    }
  }
  return settings;
}

// As many lists as the square root of the tokens, a 64th and a 16th of them, at every budget.
std::vector<Setting> ivf_settings(std::span<const double> rows) {
  std::vector<Setting> settings;
  const auto add = [&](const char* name, const auto& lists_of) {
    for (const double fraction : rows) {
      std::array<char, 64> label;
      (void)std::snprintf(label.data(), label.size(), "lists=%s rows=%g", name, fraction);
      const auto run = [=](Trial& trial) {
        const int lists = lists_of(trial.workbench().middle().size());
        const auto clusters = trial.workbench().clusters(lists, trial.seed());
        if (!clusters.ok()) return clusters.status();
        trial.note_index_bytes((*clusters)->index->bytes());
        const auto sampler = InvertedFile::create({.fraction = fraction}, ClusterScores(lists));
        if (!sampler.ok()) return sampler.status();
        return trial.decode(*sampler, *(*clusters)->index);
      };
      settings.push_back({.label = label.data(), .run = run});
    }
  };
  add("sqrt(n)", [](TokenId n) { return static_cast<int>(std::sqrt(n)); });
  add("n/64", [](TokenId n) { return KeyClusters::default_lists(n); });
  add("n/16", [](TokenId n) { return n / 16 + 1; });
  return settings;
}

}  // namespace magicpig::bench

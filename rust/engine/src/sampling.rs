//! A row of logits -> a token. Pure and seeded: the same seed, options and rows give the same
//! tokens, whatever runs beside them.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher};

use crate::error::{Error, Result};
use crate::options::Options;

mod row;

use row::Row;

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    pub token: u32,
    /// Natural log of its probability in the distribution that was drawn from: after the mask,
    /// penalties, biases, bans and temperature (greedy: temperature 1), before top_k, top_p, min_p
    /// and typical_p cut. Only when `logprobs` is on.
    pub logprob: Option<f32>,
    /// The `top_logprobs` likeliest tokens by the same measure, likeliest first; fewer where fewer
    /// are possible.
    pub top: Vec<(u32, f32)>,
}

/// Chooses one request's tokens.
///
/// The order is transformers': repetition penalty (Keskar et al., 2019), then OpenAI's frequency
/// and presence penalties and the logit bias; then, when sampling, temperature, top_k, top_p
/// (Holtzman et al., 2020), min_p (Nguyen et al., 2024), typical_p (Meister et al., 2023). Tokens
/// that tie with the k-th are kept by top_k; elsewhere of equal tokens the lower id comes first.
#[derive(Debug)]
pub struct Sampler {
    rules: Rules,
    random: Random,
    /// How often each token of prompt and output occurs in the output.
    seen: BTreeMap<u32, u32>,
    /// Work space, kept between tokens.
    row: Row,
    scores: Vec<f32>,
    candidates: Vec<Candidate>,
}

/// The options, in the sampler's own widths.
#[derive(Debug)]
struct Rules {
    greedy: bool,
    temperature: f32,
    top_k: usize,
    top_p: f64,
    min_p: f32,
    typical_p: f64,
    repetition_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    logit_bias: Vec<(u32, f32)>,
    logprobs: bool,
    top_logprobs: usize,
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    /// Logit over temperature, less the row's greatest: 0 or below.
    score: f32,
    /// exp(score).
    weight: f32,
}

impl Candidate {
    fn new(id: u32, score: f32) -> Self {
        let weight = weight(score);
        Self { id, score, weight }
    }
}

/// Scores this far below the best weigh less than half of f32's smallest number: nothing.
const WEIGHTLESS: f32 = 104.0;
/// Scores this far below the best are looked at for top_p only when those above are not enough.
const NUCLEUS_DEPTH: f32 = 8.0;

impl Sampler {
    /// A sampler for one request. `prompt_ids` count for the repetition penalty alone.
    pub fn new(options: &Options, prompt_ids: &[u32]) -> Self {
        let rules = Rules {
            greedy: !options.do_sample,
            temperature: (options.temperature as f32).max(f32::MIN_POSITIVE),
            top_k: options.top_k,
            top_p: options.top_p,
            min_p: options.min_p as f32,
            typical_p: options.typical_p,
            repetition_penalty: options.repetition_penalty as f32,
            frequency_penalty: options.frequency_penalty as f32,
            presence_penalty: options.presence_penalty as f32,
            logit_bias: options.logit_bias.clone(),
            logprobs: options.logprobs,
            top_logprobs: options.top_logprobs,
        };
        let mut seen = BTreeMap::new();
        if rules.repetition_penalty != 1.0 {
            seen.extend(prompt_ids.iter().map(|&id| (id, 0)));
        }
        Self {
            rules,
            random: Random::new(options.seed.unwrap_or_else(entropy)),
            seen,
            row: Row::default(),
            scores: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Choose a token from one row of logits, `[vocab_size]`; never one of `banned`, and only one
    /// of `allowed` where given: bit `i % 32` of word `i / 32` allows token `i`, and tokens beyond
    /// the last word are not allowed. NaN counts as minus infinity. Tell the sampler with `accept`
    /// once the token stands.
    ///
    /// # Errors
    /// `InvalidRequest` when no token is possible: every logit NaN, minus infinity, banned or not
    /// allowed.
    pub fn sample(
        &mut self,
        logits: &[f32],
        allowed: Option<&[u32]>,
        banned: &[u32],
    ) -> Result<Sampled> {
        let rules = &self.rules;
        let plain = allowed.is_none() && banned.is_empty() && !rules.adjust();
        if !plain {
            match allowed {
                None => self.row.copy(logits),
                Some(mask) => self.row.copy_allowed(logits, mask),
            }
            rules.apply(&mut self.row, &self.seen, banned);
        }
        let row = if plain { logits } else { self.row.logits() };
        let (scores, candidates) = (&mut self.scores, &mut self.candidates);
        let best = possible(greatest(row))?;
        let place = if rules.greedy || best == f32::INFINITY {
            first_of(row, best)
        } else {
            rules.gather(row, logits.len(), best, scores, candidates);
            draw(candidates, self.random.uniform())
        };
        let mut sampled = Sampled {
            token: place,
            logprob: None,
            top: Vec::new(),
        };
        if rules.logprobs {
            let scale = if rules.greedy { 1.0 } else { rules.scale() };
            let k = rules.top_logprobs;
            sampled = judge(row, best, scale, place, k, scores, candidates);
        }
        if !plain {
            let tokens = sampled.top.iter_mut().map(|(token, _)| token);
            for token in tokens.chain([&mut sampled.token]) {
                *token = self.row.id(*token);
            }
        }
        Ok(sampled)
    }

    /// A prompt's token with its log probability and the likeliest tokens' in the model's own
    /// distribution, softmax of `logits`, `[vocab_size]`.
    ///
    /// # Errors
    /// `Internal` when every logit is NaN or minus infinity.
    pub fn judge(&mut self, logits: &[f32], token: u32) -> Result<Sampled> {
        let best = possible(greatest(logits))?;
        let (scores, candidates) = (&mut self.scores, &mut self.candidates);
        let k = self.rules.top_logprobs;
        Ok(judge(logits, best, 1.0, token, k, scores, candidates))
    }

    /// A token that had no rival.
    pub fn certain(&self, token: u32) -> Sampled {
        Sampled {
            token,
            logprob: self.rules.logprobs.then_some(0.0),
            top: match self.rules.top_logprobs {
                0 => Vec::new(),
                _ => vec![(token, 0.0)],
            },
        }
    }

    /// The token is now part of the output.
    pub fn accept(&mut self, token: u32) {
        if self.rules.remember() {
            *self.seen.entry(token).or_insert(0) += 1;
        }
    }
}

impl Rules {
    fn remember(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
    }

    /// What logits are multiplied by when sampling.
    fn scale(&self) -> f32 {
        1.0 / self.temperature
    }

    fn adjust(&self) -> bool {
        self.remember() || !self.logit_bias.is_empty()
    }

    /// Penalties, biases and bans, in transformers' order.
    fn apply(&self, row: &mut Row, seen: &BTreeMap<u32, u32>, banned: &[u32]) {
        for (&id, &count) in seen {
            let Some(logit) = row.get_mut(id) else {
                continue;
            };
            let less = *logit < 0.0;
            let penalty = self.repetition_penalty;
            *logit = if less {
                *logit * penalty
            } else {
                *logit / penalty
            };
            *logit -= self.frequency_penalty * count as f32;
            *logit -= if count > 0 {
                self.presence_penalty
            } else {
                0.0
            };
        }
        for &(id, bias) in &self.logit_bias {
            if let Some(logit) = row.get_mut(id) {
                *logit += bias;
            }
        }
        for &id in banned {
            if let Some(logit) = row.get_mut(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Leave in `candidates` the tokens that may be drawn, by their place in `row`, in no particular but a fixed order.
    /// That a row leaves tokens out which are not possible, of `vocabulary` in all, changes nothing but these places.
    fn gather(
        &self,
        row: &[f32],
        vocabulary: usize,
        best: f32,
        scores: &mut Vec<f32>,
        candidates: &mut Vec<Candidate>,
    ) {
        let scale = self.scale();
        let total = if self.top_k > 0 && self.top_k < vocabulary {
            top_k(row, self.top_k, scores, candidates);
            for candidate in candidates.iter_mut() {
                candidate.score = (candidate.score - best) * scale;
                candidate.weight = weight(candidate.score);
            }
            mass(candidates)
        } else {
            self.within_reach(row, best, scale, candidates)
        };
        if self.top_p < 1.0 {
            keep_nucleus(candidates, self.top_p * total);
        }
        if self.min_p > 0.0 {
            candidates.retain(|candidate| candidate.weight >= self.min_p);
        }
        if self.typical_p < 1.0 {
            keep_typical(candidates, self.typical_p);
        }
    }

    /// Without top_k: gather what the later rules could still keep; returns the whole row's mass.
    fn within_reach(
        &self,
        row: &[f32],
        best: f32,
        scale: f32,
        candidates: &mut Vec<Candidate>,
    ) -> f64 {
        if self.top_p < 1.0 {
            let mut total = 0.0;
            candidates.clear();
            for (id, logit) in (0..).zip(row) {
                let candidate = Candidate::new(id, (logit - best) * scale);
                total += f64::from(candidate.weight);
                if candidate.score >= -NUCLEUS_DEPTH {
                    candidates.push(candidate);
                }
            }
            if mass(candidates) < self.top_p * total {
                gather_above(row, best, scale, WEIGHTLESS, candidates);
            }
            return total;
        }
        // A hair deeper than min_p's own bound: `gather` applies it exactly.
        let depth = if self.min_p > 0.0 && self.typical_p >= 1.0 {
            WEIGHTLESS.min(1e-3 - self.min_p.ln())
        } else {
            WEIGHTLESS
        };
        gather_above(row, best, scale, depth, candidates);
        mass(candidates)
    }
}

/// The token with its log probability under softmax(row * scale), and the `k` likeliest tokens'.
/// `best` is the row's greatest logit, above minus infinity.
fn judge(
    row: &[f32],
    best: f32,
    scale: f32,
    token: u32,
    k: usize,
    scores: &mut Vec<f32>,
    candidates: &mut Vec<Candidate>,
) -> Sampled {
    // Infinite logits share all there is.
    let score = |logit: f32| match logit == best {
        true => 0.0,
        false => (logit - best) * scale,
    };
    let total: f64 = row.iter().map(|x| f64::from(weight(score(*x)))).sum();
    let norm = total.ln();
    let of = |logit: f32| (f64::from(score(logit)) - norm) as f32;
    let mut top = Vec::new();
    if k > 0 {
        top_k(row, k, scores, candidates);
        candidates.sort_unstable_by(by_score);
        let likeliest = candidates.iter().take(k).map(|c| (c.id, of(c.score)));
        top.extend(likeliest.filter(|(_, logprob)| logprob.is_finite()));
    }
    Sampled {
        token,
        logprob: row.get(token as usize).map(|logit| of(*logit)),
        top,
    }
}

/// The greatest logit, NaN aside; minus infinity when there is none. Eight lanes, so that the
/// compiler can use vectors.
fn greatest(row: &[f32]) -> f32 {
    const LANES: usize = 8;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

/// The likeliest token, and by how much its logit is above the next one's.
pub fn two_likeliest(row: &[f32]) -> (u32, f32) {
    let best = greatest(row);
    let token = first_of(row, best);
    let (before, after) = row.split_at(token as usize);
    let next = greatest(before).max(greatest(after.get(1..).unwrap_or_default()));
    (token, best - next)
}

fn possible(best: f32) -> Result<f32> {
    match best > f32::NEG_INFINITY {
        true => Ok(best),
        false => Err(Error::InvalidRequest(
            "no token is possible: all logits are infinite or no numbers, since the options forbid \
             all tokens or the model's file is damaged"
                .into(),
        )),
    }
}

fn first_of(row: &[f32], value: f32) -> u32 {
    row.iter().position(|x| *x == value).unwrap_or(0) as u32
}

/// exp, with NaN weighing nothing.
fn weight(score: f32) -> f32 {
    if score >= -WEIGHTLESS {
        score.exp()
    } else {
        0.0
    }
}

fn mass(candidates: &[Candidate]) -> f64 {
    candidates
        .iter()
        .map(|candidate| f64::from(candidate.weight))
        .sum()
}

/// Likeliest first; of equal ones the lower id.
fn by_score(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// Gather the tokens at most `depth` below the best, by id.
fn gather_above(row: &[f32], best: f32, scale: f32, depth: f32, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    for (id, logit) in (0..).zip(row) {
        let score = (logit - best) * scale;
        if score >= -depth {
            candidates.push(Candidate::new(id, score));
        }
    }
}

/// Gather the `k` greatest logits and all that tie with the k-th, by id; fewer where fewer are
/// above minus infinity. `score` is the logit, `weight` is left 0.
///
/// One pass: a rising threshold turns nearly every token away, so the row is never sorted.
fn top_k(row: &[f32], k: usize, scores: &mut Vec<f32>, candidates: &mut Vec<Candidate>) {
    const CHUNK: usize = 16;
    candidates.clear();
    let mut threshold = f32::MIN;
    let mut room = 2 * k + CHUNK;
    for (n, chunk) in row.chunks(CHUNK).enumerate() {
        if !chunk.iter().fold(false, |any, x| any | (*x >= threshold)) {
            continue;
        }
        for (i, logit) in chunk
            .iter()
            .enumerate()
            .filter(|(_, logit)| **logit >= threshold)
        {
            let id = (n * CHUNK + i) as u32;
            candidates.push(Candidate {
                id,
                score: *logit,
                weight: 0.0,
            });
        }
        if candidates.len() >= room {
            threshold = keep_greatest(candidates, k, scores);
            // Ties may keep the list long: wait until it has doubled again.
            room = 2 * candidates.len() + CHUNK;
        }
    }
    keep_greatest(candidates, k, scores);
}

/// Drop what is below the k-th greatest score; returns that score.
fn keep_greatest(candidates: &mut Vec<Candidate>, k: usize, scores: &mut Vec<f32>) -> f32 {
    if candidates.len() <= k {
        return f32::MIN;
    }
    scores.clear();
    scores.extend(candidates.iter().map(|candidate| candidate.score));
    let (_, kth, _) = scores.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let kth = *kth;
    candidates.retain(|candidate| candidate.score >= kth);
    kth
}

/// Keep the likeliest tokens whose likelier ones weigh less than `limit` together: the smallest set
/// that reaches it. Halves by selection instead of sorting, as only the set matters.
fn keep_nucleus(candidates: &mut Vec<Candidate>, limit: f64) {
    if candidates.is_empty() {
        return;
    }
    // All before `low` weigh `before` and are kept with the one at `low`; from `high` none is.
    let (mut low, mut high, mut before) = (0, candidates.len(), 0.0);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        candidates[low..high].select_nth_unstable_by(middle - low, by_score);
        let upper = mass(&candidates[low..middle]);
        if before + upper < limit {
            before += upper;
            low = middle;
        } else {
            high = middle;
        }
    }
    candidates.truncate(high);
}

/// Keep the tokens whose surprise is nearest to the expected one, until they reach `limit` of the
/// mass; those as near as the last one are kept too.
fn keep_typical(candidates: &mut Vec<Candidate>, limit: f64) {
    let total = mass(candidates);
    let norm = total.ln();
    let surprise = |candidate: &Candidate| norm - f64::from(candidate.score);
    let entropy: f64 = candidates
        .iter()
        .map(|c| f64::from(c.weight) / total * surprise(c))
        .sum();
    let distance = |candidate: &Candidate| (surprise(candidate) - entropy).abs();
    candidates.sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.id.cmp(&b.id)));
    let mut reached = 0.0;
    let last = candidates.iter().position(|candidate| {
        reached += f64::from(candidate.weight) / total;
        reached >= limit
    });
    if let Some(last) = last {
        let farthest = distance(&candidates[last]);
        candidates.retain(|candidate| distance(candidate) <= farthest);
    }
}

/// The token at `uniform` (0..1) of the candidates' mass.
fn draw(candidates: &[Candidate], uniform: f64) -> u32 {
    let mut left = uniform * mass(candidates);
    let mut drawn = 0;
    for candidate in candidates.iter().filter(|candidate| candidate.weight > 0.0) {
        drawn = candidate.id;
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            break;
        }
    }
    drawn
}

/// SplitMix64 (Steele, Lea and Flood, 2014): one draw per token needs no more.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Evenly in 0..1, 1 not included.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A seed from the system. Process and time are part of it: a forked child inherits the hash keys.
fn entropy() -> u64 {
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    hasher.write_u128(now.map(|d| d.as_nanos()).unwrap_or_default());
    hasher.finish()
}

#[cfg(test)]
mod tests;

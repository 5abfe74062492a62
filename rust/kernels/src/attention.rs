//! Attention over a paged cache of keys and values, in chunks of positions.
//!
//! Each chunk is softened by itself, and chunks are added up in order (Milakov and Gimelshein 2018, arXiv:1805.02867).
//! They lie at fixed positions: a query's bits depend on nothing but itself, neither on who else is in the step nor on
//! how many threads share its chunks.

#![expect(
    clippy::needless_range_loop,
    reason = "one index runs over several register arrays at once"
)]

use std::mem::MaybeUninit;

use crate::elementwise::{LOG2_E, exp, exp2};
use crate::pool::{Pool, SendPtr};
use crate::simd::{Isa, LANES, Simd, dispatch, load_part, prefetch, store_part};

use crate::kv::{F16, I8, Stored};
pub use crate::kv::{KvLayer, KvType, PAGE, Span};

/// Queries of one unit of work, at most: their weights of a chunk take half of the nearest cache.
const GROUP: usize = 24;

/// Head dimensions of a query that lie together.
const SEGMENT: usize = 64;

/// Pages and positions of a chunk.
const PAGES: usize = 16;
const CHUNK: usize = PAGES * PAGE;

/// Pages that are fetched ahead: pages of one head do not lie side by side, so that the CPU's own prefetching does not see
/// the next one coming.
const AHEAD: usize = 2;

/// What a layer's attention is.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)` (gemma 2).
    pub softcap: Option<f32>,
    /// A query sees the last `window` positions, its own among them, and as many after it where it sees both ways.
    pub window: Option<usize>,
    /// A query also sees the positions of its span's sequence after its own: encoders, which run whole.
    pub both_ways: bool,
}

impl AttentionShape {
    /// The positions that the `row`-th row of a span sees: never fewer than one, and both ends grow with the row.
    pub fn sees(&self, span: &Span, row: usize) -> std::ops::Range<usize> {
        let own = span.start + row;
        let window = self.window.unwrap_or(usize::MAX).max(1);
        let last = match self.both_ways {
            true => own
                .saturating_add(window - 1)
                .min(span.start + span.rows - 1),
            false => own,
        };
        (own + 1).saturating_sub(window)..last + 1
    }

    /// Queries of one kv head in a row.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// One unit of work: some queries (row, head) of one kv head of one span, over some chunks.
#[derive(Clone, Copy)]
struct Unit {
    span: usize,
    kv_head: usize,
    first: usize,
    count: usize,
    /// The chunks that any of its queries sees, and the part of them that is this unit's.
    seen: (usize, usize),
    chunks: (usize, usize),
    /// Where the sums of its queries begin, if it has not all chunks: `[query][chunk seen]`.
    sums: usize,
}

impl Unit {
    fn whole(&self) -> bool {
        self.seen == self.chunks
    }
}

/// Reusable memory: the units of a step, and the sums of the chunks of those that share their queries.
#[derive(Default)]
pub struct AttentionPlan {
    units: Vec<Unit>,
    sums: Vec<f32>,
}

impl AttentionPlan {
    fn fill(&mut self, shape: &AttentionShape, cache: &KvLayer, spans: &[Span], threads: usize) {
        self.units.clear();
        let queries = |span: &Span| span.rows * shape.group();
        let all = spans.iter().map(queries).sum::<usize>() * shape.kv_heads;
        // Smaller groups rather than threads without one.
        let size = if all < 4 * threads * GROUP {
            GROUP / 2
        } else {
            GROUP
        };
        let groups = |span: &Span| queries(span).div_ceil(size);
        let groups: usize = spans.iter().map(groups).sum::<usize>() * shape.kv_heads;
        // Enough units for the threads: where there are few queries, they share one's chunks.
        let parts = (4 * threads).div_ceil(groups.max(1));
        let parts = if threads == 1 { 1 } else { parts };
        let mut sums = 0;
        for (i, span) in spans.iter().enumerate() {
            let queries = queries(span);
            for kv_head in 0..shape.kv_heads {
                for first in (0..queries).step_by(size) {
                    let count = size.min(queries - first);
                    let sees = |query: usize| shape.sees(span, query / shape.group());
                    let seen = (
                        sees(first).start / CHUNK,
                        (sees(first + count - 1).end - 1) / CHUNK + 1,
                    );
                    let chunks = seen.1 - seen.0;
                    let each = chunks.div_ceil(parts);
                    for from in (seen.0..seen.1).step_by(each) {
                        self.units.push(Unit {
                            span: i,
                            kv_head,
                            first,
                            count,
                            seen,
                            chunks: (from, seen.1.min(from + each)),
                            sums,
                        });
                    }
                    if each < chunks {
                        sums += count * chunks * (cache.padded + LANES);
                    }
                }
            }
        }
        if self.sums.len() < sums {
            self.sums.resize(sums, 0.0);
        }
    }
}

/// One step's queries, keys and values.
pub struct AttentionInput<'a> {
    pub spans: &'a [Span],
    pub pages: &'a [u32],
    /// Rows of `width` floats, queries first.
    pub q: &'a [f32],
    pub width: usize,
    /// A score for each head that takes its share of the weights and gives nothing (gpt-oss).
    pub sinks: Option<&'a [f32]>,
    /// Added to scores by how far the key stands behind the query (mpnet): `[heads][2 * reach]`, from `-reach` on; `reach`
    /// is a multiple of [`PAGE`], and no position lies beyond it.
    pub distances: Option<&'a [f32]>,
}

/// `out[row] = softmax(q k^T * scale) v` for every row and head of the step; rows of `heads * head_dim`.
///
/// # Panics
/// When a page number or a span is out of bounds, or the lengths do not agree.
pub fn attend(
    isa: Isa,
    pool: &Pool,
    plan: &mut AttentionPlan,
    shape: &AttentionShape,
    cache: &KvLayer,
    input: &AttentionInput,
    out: &mut [f32],
) {
    let rows: usize = input.spans.iter().map(|s| s.rows).sum();
    let out_width = shape.heads * shape.head_dim;
    assert_eq!(out.len(), rows * out_width);
    assert!(input.q.len() >= rows * input.width && input.width >= out_width);
    assert!(
        input.sinks.is_none_or(|s| s.len() == shape.heads),
        "a sink for each head"
    );
    if let Some(table) = input.distances {
        let reach = table.len() / (2 * shape.heads);
        assert!(
            table.len() == 2 * shape.heads * reach && reach.is_multiple_of(PAGE),
            "distances of all heads in whole pages"
        );
        let within = |span: &Span| span.start + span.rows <= reach;
        assert!(input.spans.iter().all(within), "positions below {reach}");
    }
    assert_eq!(
        (cache.kv_heads, cache.head_dim),
        (shape.kv_heads, shape.head_dim)
    );
    cache.check_pages(input.spans, input.pages);
    let mut next = 0;
    for span in input.spans {
        assert_eq!(span.first_row, next, "spans follow one another");
        next += span.rows;
    }
    plan.fill(shape, cache, input.spans, pool.threads());
    let out = SendPtr(out.as_mut_ptr());
    let AttentionPlan { units, sums } = plan;
    let sums = SendPtr(sums.as_mut_ptr());
    let task = Task {
        shape,
        cache,
        input,
    };
    // The last first: later queries see more, and what is long should not begin when all else is done.
    pool.run(units.len(), |i| {
        let unit = units[units.len() - 1 - i];
        // SAFETY: bounds were checked above; a unit's queries, or its chunks of them, are its own.
        unsafe {
            match cache.kind {
                KvType::F16 => attend_unit::<F16>(isa, &task, unit, sums.get(), out.get()),
                KvType::Int8 => attend_unit::<I8>(isa, &task, unit, sums.get(), out.get()),
            }
        }
    });
    // The queries whose chunks were shared: few, and short work.
    for unit in units
        .iter()
        .filter(|u| !u.whole() && u.chunks.0 == u.seen.0)
    {
        // SAFETY: as above; all units are done.
        unsafe { add_chunks(isa, &task, *unit, sums.get(), out.get()) }
    }
}

/// A query of a unit.
#[derive(Clone, Copy, Default)]
struct Query {
    /// In the step.
    row: usize,
    head: usize,
    position: usize,
    /// The first position that it sees, and the first after the last.
    sees: (usize, usize),
}

/// What all units of a step read.
struct Task<'a> {
    shape: &'a AttentionShape,
    cache: &'a KvLayer,
    input: &'a AttentionInput<'a>,
}

impl Task<'_> {
    fn query(&self, unit: &Unit, i: usize) -> Query {
        let (span, group) = (&self.input.spans[unit.span], self.shape.group());
        let row = (unit.first + i) / group;
        let sees = self.shape.sees(span, row);
        Query {
            row: span.first_row + row,
            head: unit.kv_head * group + (unit.first + i) % group,
            position: span.start + row,
            sees: (sees.start, sees.end),
        }
    }

    /// What is added to the scores of a query, from the key at position 0 on: a whole page for every page that it sees.
    fn distances(&self, query: &Query) -> Option<&[f32]> {
        let table = self.input.distances?;
        let reach = table.len() / (2 * self.shape.heads);
        let of_head = &table[query.head * 2 * reach..][..2 * reach];
        Some(&of_head[reach - query.position..])
    }

    /// Floats of one query's sums over one chunk: values, then the sum of the weights and their maximum.
    fn width(&self) -> usize {
        self.cache.padded + LANES
    }
}

dispatch! {
    unsafe fn attend_unit<K: Stored>(task: &Task, unit: Unit, sums: *mut f32, out: *mut f32) = unit_body
}

dispatch! {
    unsafe fn add_chunks<>(task: &Task, unit: Unit, sums: *const f32, out: *mut f32) = add_chunks_body
}

/// Add up the chunks of a unit's queries that units have left in `sums`.
#[inline(always)]
unsafe fn add_chunks_body<S: Simd>(task: &Task, unit: Unit, sums: *const f32, out: *mut f32) {
    let (padded, width) = (task.cache.padded, task.width());
    let chunks = unit.seen.1 - unit.seen.0;
    let mut total = Vec::with_capacity(padded);
    for i in 0..unit.count {
        total.clear();
        total.resize(padded, 0.0);
        let mut running = Running::default();
        for chunk in 0..chunks {
            // SAFETY: `fill` made room for all chunks of all queries.
            unsafe {
                let from = sums.add(unit.sums + (i * chunks + chunk) * width);
                let of = Running {
                    sum: *from.add(padded),
                    max: *from.add(padded + 1),
                };
                add_chunk::<S>(&mut running, total.as_mut_ptr(), padded, of, from);
            }
        }
        // SAFETY: a query's outputs are its own.
        unsafe { finish::<S>(task, &unit, i, &running, total.as_ptr(), out) };
    }
}

/// The sum of the weights of one query relative to the maximum of its scores.
#[derive(Clone, Copy)]
struct Running {
    sum: f32,
    max: f32,
}

impl Default for Running {
    fn default() -> Self {
        Self {
            sum: 0.0,
            max: f32::NEG_INFINITY,
        }
    }
}

/// Add a chunk's sums to those of the chunks before it, if there are any: else `total` is written, not read. A chunk that
/// a query does not see changes no bit.
#[inline(always)]
unsafe fn add_chunk<S: Simd>(
    running: &mut Running,
    total: *mut f32,
    padded: usize,
    of: Running,
    values: *const f32,
) {
    if of.sum == 0.0 {
        return;
    }
    if running.sum == 0.0 {
        *running = of;
        // SAFETY: both have `padded` floats.
        return unsafe { total.copy_from_nonoverlapping(values, padded) };
    }
    let max = if of.max > running.max {
        of.max
    } else {
        running.max
    };
    let old = exp2(running.max - max);
    let new = exp2(of.max - max);
    running.max = max;
    running.sum = new.mul_add(of.sum, running.sum * old);
    for c in (0..padded).step_by(LANES) {
        // SAFETY: both have whole vectors.
        unsafe {
            let to = total.add(c);
            let before = S::mul(S::load_f32(to), S::splat(old));
            S::store(
                to,
                S::fma(S::load_f32(values.add(c)), S::splat(new), before),
            );
        }
    }
}

#[inline(always)]
unsafe fn finish<S: Simd>(
    task: &Task,
    unit: &Unit,
    i: usize,
    running: &Running,
    total: *const f32,
    out: *mut f32,
) {
    let Query { row, head, .. } = task.query(unit, i);
    let dim = task.shape.head_dim;
    let mut sum = running.sum;
    if let Some(sinks) = task.input.sinks {
        // Weights are powers of two, relative to the largest score.
        let sink = sinks[head] * LOG2_E;
        let above = (sink - running.max).max(0.0);
        let own = exp2((sink - running.max).min(0.0));
        // Where the sink stands above, the values shrink by as much: the sum grows instead.
        sum += own / exp2(-above);
    }
    // SAFETY: `out` has `dim` floats for every row and head; `total` has whole vectors.
    unsafe {
        let out = out.add((row * task.shape.heads + head) * dim);
        let out = std::slice::from_raw_parts_mut(out, dim);
        for at in (0..dim).step_by(LANES) {
            let x = S::div(S::load_f32(total.add(at)), S::splat(sum));
            store_part::<S>(out, at, x);
        }
    }
}

/// What a unit works in, on the stack for ordinary heads.
struct Work {
    /// Queries times the scale, `[segment][query][SEGMENT]`: rows at constant distances, one pointer to all.
    q: *mut f32,
    /// Scores, then weights, of a chunk: `[query][CHUNK]`.
    weights: *mut f32,
    /// Sums of values of a chunk and of all: `[query][padded]`.
    acc: *mut f32,
    total: *mut f32,
}

/// Head dimensions whose units find room on the stack.
const ORDINARY: usize = 256;

/// The queries of one unit against the pages of its chunks that any of them sees. A page that one of them does not see
/// leaves its bits alone: its weights there are exactly zero, and the cache holds only finite values.
#[inline(always)]
unsafe fn unit_body<S: Simd, K: Stored>(task: &Task, unit: Unit, sums: *mut f32, out: *mut f32) {
    let padded = task.cache.padded;
    let room = |padded: usize| GROUP * (3 * padded.next_multiple_of(SEGMENT) + CHUNK);
    let mut small = [const { MaybeUninit::<f32>::uninit() }; GROUP * (3 * ORDINARY + CHUNK)];
    let mut large = Vec::new();
    let memory = if padded <= ORDINARY {
        small.as_mut_ptr()
    } else {
        large.resize(room(padded), MaybeUninit::uninit());
        large.as_mut_ptr()
    };
    // SAFETY: three times `GROUP` rows of a head's numbers and `GROUP` of a chunk's weights have room.
    unsafe {
        let memory = memory.cast::<f32>();
        let each = GROUP * padded.next_multiple_of(SEGMENT);
        let work = Work {
            weights: memory,
            q: memory.add(GROUP * CHUNK),
            acc: memory.add(GROUP * CHUNK + each),
            total: memory.add(GROUP * CHUNK + 2 * each),
        };
        unit_in::<S, K>(task, unit, &work, sums, out);
    }
}

#[inline(always)]
unsafe fn unit_in<S: Simd, K: Stored>(
    task: &Task,
    unit: Unit,
    work: &Work,
    sums: *mut f32,
    out: *mut f32,
) {
    let Task {
        shape,
        cache,
        input,
    } = task;
    let (dim, padded, count) = (shape.head_dim, cache.padded, unit.count);
    let span = &input.spans[unit.span];
    let mut queries = [Query::default(); GROUP];
    // Weights are powers of two, which are simpler than those of e.
    let scale = shape.softcap.map_or(LOG2_E * shape.scale, |_| shape.scale);
    for i in 0..count {
        let query = task.query(&unit, i);
        queries[i] = query;
        let q = &input.q[query.row * input.width + query.head * dim..][..dim];
        for (segment, q) in q.chunks(SEGMENT).enumerate() {
            for at in (0..q.len()).step_by(LANES) {
                // SAFETY: `work.q` has whole segments.
                unsafe {
                    let x = S::mul(load_part::<S>(q, at), S::splat(scale));
                    S::store(work.q.add((segment * GROUP + i) * SEGMENT + at), x);
                }
            }
        }
    }
    let first_page = queries[0].sees.0 / PAGE;
    let last_page = (queries[count - 1].sees.1 - 1) / PAGE;
    let mut running = [Running::default(); GROUP];
    let mut of = [Running::default(); GROUP];
    for chunk in unit.chunks.0..unit.chunks.1 {
        let from = first_page.max(chunk * PAGES);
        let to = (last_page + 1).min((chunk + 1) * PAGES);
        let at = (from % PAGES) * PAGE;
        let number = |page: usize| input.pages[span.first_page + page] as usize;
        let keys_of = |page: usize| cache.keys(number(page), unit.kv_head);
        let mut keys: [&[u8]; PAGES] = [&[]; PAGES];
        let mut values: [&[u8]; PAGES] = [&[]; PAGES];
        for (i, page) in (from..to).enumerate() {
            keys[i] = keys_of(page);
            values[i] = cache.values(number(page), unit.kv_head);
        }
        let (keys, values) = (&keys[..to - from], &values[..to - from]);
        let (queries, of) = (&queries[..count], &mut of[..count]);
        // SAFETY: pages have room for `dim` keys and `padded` values of each position; the blocks lie inside `work`.
        unsafe {
            score_pages::<S, K>(work.q, count, keys, dim, work.weights.add(at));
            values.iter().take(AHEAD).for_each(|next| prefetch(next));
            let weights = work.weights.add(at);
            soften::<S, K>(task, weights, from * PAGE, values, queries, of);
            (to..(last_page + 1).min(to + AHEAD)).for_each(|next| prefetch(keys_of(next)));
            add_pages::<S, K>(weights, count, values, padded, work.acc);
        }
        for i in 0..count {
            // SAFETY: `add_pages` wrote `padded` floats of each query; `fill` made room for all chunks of all queries,
            // and this chunk is this unit's.
            unsafe {
                let acc = work.acc.add(i * padded);
                if unit.whole() {
                    let total = work.total.add(i * padded);
                    add_chunk::<S>(&mut running[i], total, padded, of[i], acc);
                    continue;
                }
                let at = i * (unit.seen.1 - unit.seen.0) + chunk - unit.seen.0;
                let to = sums.add(unit.sums + at * task.width());
                to.copy_from_nonoverlapping(acc, padded);
                *to.add(padded) = of[i].sum;
                *to.add(padded + 1) = of[i].max;
            }
        }
    }
    if unit.whole() {
        for i in 0..count {
            // SAFETY: a query's outputs are its own.
            unsafe { finish::<S>(task, &unit, i, &running[i], work.total.add(i * padded), out) };
        }
    }
}

/// Turn the scores of whole pages from position `first` on into weights relative to their maximum, which is returned with
/// their sum; invisible ones become 0. What the values are to be multiplied by is folded in. `scores` are `[query][CHUNK]`.
#[inline(always)]
unsafe fn soften<S: Simd, K: Stored>(
    task: &Task,
    scores: *mut f32,
    first: usize,
    values: &[&[u8]],
    queries: &[Query],
    of: &mut [Running],
) {
    let length = values.len() * PAGE;
    let last = first + length;
    // SAFETY: a row of scores for each query, says the caller.
    let row = |i: usize| unsafe { std::slice::from_raw_parts_mut(scores.add(i * CHUNK), length) };
    // In two rounds, so that a query's work does not wait for the latency of its own maximum.
    for (i, of) in of.iter_mut().enumerate() {
        let (row, query) = (row(i), &queries[i]);
        if let Some(cap) = task.shape.softcap {
            for s in row.iter_mut() {
                // tanh(t) = 1 - 2 / (exp(2 t) + 1)
                *s = LOG2_E * cap * (1.0 - 2.0 / (exp(2.0 * *s / cap) + 1.0));
            }
        }
        if let Some(distances) = task.distances(query) {
            let pages = distances[first..].chunks_exact(LANES);
            for (page, more) in row.chunks_exact_mut(LANES).zip(pages) {
                // SAFETY: a vector each.
                unsafe {
                    let (s, more) = (S::load_f32(page.as_ptr()), S::load_f32(more.as_ptr()));
                    S::store(page.as_mut_ptr(), S::fma(more, S::splat(LOG2_E), s));
                }
            }
        }
        row[..query.sees.0.clamp(first, last) - first].fill(f32::NEG_INFINITY);
        row[query.sees.1.clamp(first, last) - first..].fill(f32::NEG_INFINITY);
        // SAFETY: whole pages, a vector each; so below.
        unsafe {
            let mut lanes = S::splat(f32::NEG_INFINITY);
            for page in row.chunks_exact(LANES) {
                lanes = S::max(lanes, S::load_f32(page.as_ptr()));
            }
            of.max = S::largest(lanes);
        }
    }
    for (i, of) in of.iter_mut().enumerate() {
        let row = row(i);
        // SAFETY: as above.
        unsafe {
            let mut sums = S::splat(0.0);
            for (page, values) in row.chunks_exact_mut(LANES).zip(values) {
                let s = S::load_f32(page.as_ptr());
                let weight = S::exp2(S::add(s, S::splat(-of.max)));
                let weight = S::keep_unequal(weight, s, S::splat(f32::NEG_INFINITY));
                sums = S::add(sums, weight);
                S::store(page.as_mut_ptr(), scaled::<S, K>(weight, values));
            }
            of.sum = S::sum(sums);
        }
    }
}

/// Times the scales of a page's positions, if its type has any.
#[inline(always)]
unsafe fn scaled<S: Simd, K: Stored>(x: S::F, page: &[u8]) -> S::F {
    if K::SCALES == 0 {
        return x;
    }
    // SAFETY: a page begins with a scale for each position.
    unsafe { S::mul(x, S::load_f32(page.as_ptr().cast())) }
}

/// `sized!(S, K, count, f(..))` is `f::<S, K, count, n>(..)` with the largest `n` of 4, 2, 1 whose `count * n` sums fit
/// the registers: what is read of a query or weight then serves `n` vectors of keys or values.
macro_rules! sized {
    ($S:ident, $K:ident, $count:expr, $f:ident($($arg:expr),*)) => {
        sized!(@ $S, $K, $count, $f($($arg),*), 1 2 3 4 5 6 7 8 9 10 11; 12)
    };
    (@ $S:ident, $K:ident, $count:expr, $f:ident $args:tt, $($n:literal)*; $last:literal) => {
        match $count {
            $($n => sized!(# $S, $K, $n, $f $args),)*
            _ => sized!(# $S, $K, $last, $f $args),
        }
    };
    (# $S:ident, $K:ident, $n:literal, $f:ident($($arg:expr),*)) => {
        if $n * 4 <= $S::SUMS {
            $f::<$S, $K, $n, 4>($($arg),*)
        } else if $n * 2 <= $S::SUMS {
            $f::<$S, $K, $n, 2>($($arg),*)
        } else if $n <= $S::QUERIES {
            $f::<$S, $K, $n, 1>($($arg),*)
        }
    };
}

/// Scores of `count` queries with the keys of all pages.
#[inline(always)]
unsafe fn score_pages<S: Simd, K: Stored>(
    q: *const f32,
    count: usize,
    keys: &[&[u8]],
    dim: usize,
    out: *mut f32,
) {
    for first in (0..count).step_by(S::QUERIES) {
        // SAFETY: rows of `count` queries.
        unsafe {
            let (q, out) = (q.add(first * SEGMENT), out.add(first * CHUNK));
            sized!(
                S,
                K,
                S::QUERIES.min(count - first),
                score_block(q, keys, dim, out)
            );
        }
    }
}

#[inline(always)]
unsafe fn score_block<S: Simd, K: Stored, const Q: usize, const N: usize>(
    q: *const f32,
    keys: &[&[u8]],
    dim: usize,
    out: *mut f32,
) {
    let (whole, rest) = keys.as_chunks::<N>();
    // SAFETY: every page has `dim` keys and its place in `out`.
    unsafe {
        for (i, pages) in whole.iter().enumerate() {
            let next = &keys[(i + 1) * N..];
            next.iter().take(N).for_each(|next| prefetch(next));
            scores::<S, K, Q, N>(q, pages, dim, out.add(i * N * PAGE));
        }
        for (i, page) in rest.iter().enumerate() {
            scores::<S, K, Q, 1>(q, &[page], dim, out.add((whole.len() * N + i) * PAGE));
        }
    }
}

/// Dot products of `Q` queries with the keys of `N` pages, to `out[query][page][..]`. One sum each, in order of
/// dimensions: how many are made at once changes no bit.
#[inline(always)]
unsafe fn scores<S: Simd, K: Stored, const Q: usize, const N: usize>(
    mut q: *const f32,
    pages: &[&[u8]; N],
    dim: usize,
    out: *mut f32,
) {
    // SAFETY: `Q` queries in whole segments, `dim` keys in each page, and `Q` rows of `out`.
    unsafe {
        let mut sums = [[S::splat(0.0); N]; Q];
        let mut keys = pages.map(|page| page.as_ptr().add(K::SCALES));
        let mut left = dim;
        while left > 0 {
            let n = left.min(SEGMENT);
            for d in 0..n {
                let mut k = [S::splat(0.0); N];
                for p in 0..N {
                    k[p] = K::load::<S>(keys[p].add(d * PAGE * K::BYTES));
                }
                for i in 0..Q {
                    let x = S::splat(*q.add(i * SEGMENT + d));
                    for p in 0..N {
                        sums[i][p] = S::fma(k[p], x, sums[i][p]);
                    }
                }
            }
            for p in 0..N {
                keys[p] = keys[p].add(n * PAGE * K::BYTES);
            }
            q = q.add(GROUP * SEGMENT);
            left -= n;
        }
        for i in 0..Q {
            for p in 0..N {
                let sum = scaled::<S, K>(sums[i][p], pages[p]);
                S::store(out.add(i * CHUNK + p * PAGE), sum);
            }
        }
    }
}

/// `acc = weights * values` of `count` queries over all pages.
#[inline(always)]
unsafe fn add_pages<S: Simd, K: Stored>(
    weights: *const f32,
    count: usize,
    values: &[&[u8]],
    padded: usize,
    acc: *mut f32,
) {
    for first in (0..count).step_by(S::QUERIES) {
        // SAFETY: rows of `count` queries.
        unsafe {
            let (weights, acc) = (weights.add(first * CHUNK), acc.add(first * padded));
            sized!(
                S,
                K,
                S::QUERIES.min(count - first),
                add_block(weights, values, padded, acc)
            );
        }
    }
}

#[inline(always)]
unsafe fn add_block<S: Simd, K: Stored, const Q: usize, const N: usize>(
    weights: *const f32,
    values: &[&[u8]],
    padded: usize,
    acc: *mut f32,
) {
    let mut c = 0;
    // SAFETY: `acc` has `padded` floats for each query, every page as many values for each position.
    unsafe {
        while c + N * LANES <= padded {
            add_values::<S, K, Q, N>(weights, values, padded, c, acc);
            c += N * LANES;
        }
        while c < padded {
            add_values::<S, K, Q, 1>(weights, values, padded, c, acc);
            c += LANES;
        }
    }
}

/// `acc[..][c..] = weights * values` for `N` vectors of dimensions from `c` on: the sums stay in registers.
#[inline(always)]
unsafe fn add_values<S: Simd, K: Stored, const Q: usize, const N: usize>(
    mut weights: *const f32,
    values: &[&[u8]],
    padded: usize,
    c: usize,
    acc: *mut f32,
) {
    let (from, size) = (K::SCALES + c * PAGE * K::BYTES, N * LANES * PAGE * K::BYTES);
    // SAFETY: `Q` rows of weights and of sums, the latter `padded` long, as each page's values are.
    unsafe {
        let mut sums = [[S::splat(0.0); N]; Q];
        for (page, of) in values.iter().enumerate() {
            if let Some(next) = values.get(page + AHEAD) {
                prefetch(&next[from..from + size]);
            }
            let of = of.as_ptr().add(from);
            for j in 0..PAGE {
                let mut v = [S::splat(0.0); N];
                for n in 0..N {
                    v[n] = K::load::<S>(of.add((n * PAGE + j) * LANES * K::BYTES));
                }
                for i in 0..Q {
                    let weight = S::splat(*weights.add(i * CHUNK + j));
                    for n in 0..N {
                        sums[i][n] = S::fma(v[n], weight, sums[i][n]);
                    }
                }
            }
            weights = weights.add(PAGE);
        }
        for i in 0..Q {
            for n in 0..N {
                S::store(acc.add(i * padded + c + n * LANES), sums[i][n]);
            }
        }
    }
}

/// The definition, for tests: f64, no pages in sight.
#[doc(hidden)]
pub fn attend_naive(shape: &AttentionShape, cache: &KvLayer, input: &AttentionInput) -> Vec<f64> {
    let rows: usize = input.spans.iter().map(|s| s.rows).sum();
    let (dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let mut out = vec![0f64; rows * shape.heads * dim];
    for span in input.spans {
        let page = |p: usize| input.pages[span.first_page + p / PAGE] as usize;
        for i in 0..span.rows {
            let (row, sees) = (span.first_row + i, shape.sees(span, i));
            for head in 0..shape.heads {
                let q = &input.q[row * input.width + head * dim..][..dim];
                let key = |p: usize, d: usize| cache.key(page(p), head / group, p % PAGE, d);
                let value = |p: usize, d: usize| cache.value(page(p), head / group, p % PAGE, d);
                let score = |p: usize| {
                    let more = input.distances.map_or(0.0, |table| {
                        let reach = table.len() / (2 * shape.heads);
                        table[head * 2 * reach + reach + p - span.start - i]
                    });
                    let dot: f64 = (0..dim)
                        .map(|d| f64::from(q[d]) * f64::from(key(p, d)))
                        .sum();
                    let s = dot * f64::from(shape.scale);
                    let cap = |c: f32| f64::from(c) * (s / f64::from(c)).tanh();
                    shape.softcap.map_or(s, cap) + f64::from(more)
                };
                let scores: Vec<f64> = sees.clone().map(score).collect();
                let sink = input.sinks.map(|s| f64::from(s[head]));
                let max = scores.iter().cloned().chain(sink).fold(f64::MIN, f64::max);
                let all = scores.iter().cloned().chain(sink);
                let sum: f64 = all.map(|s| (s - max).exp()).sum();
                for (p, s) in sees.clone().zip(&scores) {
                    for d in 0..dim {
                        out[(row * shape.heads + head) * dim + d] +=
                            (s - max).exp() / sum * f64::from(value(p, d));
                    }
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (((i + seed) * 7919 % 10007) as f32 / 5003.5 - 1.0) * 2.0)
            .collect()
    }

    struct Case {
        shape: AttentionShape,
        cache: KvLayer,
        spans: Vec<Span>,
        pages: Vec<u32>,
        qkv: Vec<f32>,
        width: usize,
        sinks: Option<Vec<f32>>,
        distances: Option<Vec<f32>>,
    }

    /// Two sequences, one with a past, whose pages lie scattered; keys and values of all positions stored.
    fn case(
        kind: KvType,
        heads: usize,
        kv_heads: usize,
        dim: usize,
        window: Option<usize>,
        softcap: Option<f32>,
    ) -> Case {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim: dim,
            scale: 1.0 / (dim as f32).sqrt(),
            softcap,
            window,
            both_ways: false,
        };
        let mut cache = KvLayer::new(kind, 16, kv_heads, dim);
        let width = (heads + 2 * kv_heads) * dim;
        let pages: Vec<u32> = vec![3, 9, 1, 7, 15, 0, 2, 4, 6];
        let pool = Pool::new(2);
        // The past of the first sequence.
        let past = Span {
            first_row: 0,
            rows: 40,
            first_page: 0,
            pages: 5,
            start: 0,
            long: false,
        };
        cache.store(
            Isa::detect(),
            &pool,
            &[past],
            &pages,
            &numbers(40 * width, 5),
            width,
            heads * dim,
        );
        let spans = vec![
            Span {
                first_row: 0,
                rows: 21,
                first_page: 0,
                pages: 5,
                start: 40,
                long: false,
            },
            Span {
                first_row: 21,
                rows: 35,
                first_page: 5,
                pages: 4,
                start: 0,
                long: false,
            },
        ];
        let qkv = numbers(56 * width, 77);
        cache.store(
            Isa::detect(),
            &pool,
            &spans,
            &pages,
            &qkv,
            width,
            heads * dim,
        );
        Case {
            shape,
            cache,
            spans,
            pages,
            qkv,
            width,
            sinks: None,
            distances: None,
        }
    }

    fn run(c: &Case, isa: Isa, threads: usize) -> Vec<f32> {
        let input = AttentionInput {
            spans: &c.spans,
            pages: &c.pages,
            q: &c.qkv,
            width: c.width,
            sinks: c.sinks.as_deref(),
            distances: c.distances.as_deref(),
        };
        let mut out = vec![0.0; 56 * c.shape.heads * c.shape.head_dim];
        attend(
            isa,
            &Pool::new(threads),
            &mut AttentionPlan::default(),
            &c.shape,
            &c.cache,
            &input,
            &mut out,
        );
        out
    }

    const KINDS: [KvType; 2] = [KvType::F16, KvType::Int8];

    #[test]
    fn attention_is_the_definition_on_every_path() {
        for (heads, kv, dim, window, softcap) in [
            (9, 3, 64, None, None),
            (4, 2, 24, Some(32), None),
            (4, 1, 256, Some(7), None),
            (2, 2, 31, None, Some(5.0)),
            (10, 1, 272, None, None),
        ] {
            for kind in KINDS {
                let mut c = case(kind, heads, kv, dim, window, softcap);
                // One that stands below all scores, and some far above.
                c.sinks = (heads == 4).then(|| vec![-9.0, 0.5, 4.0, 30.0]);
                let input = AttentionInput {
                    spans: &c.spans,
                    pages: &c.pages,
                    q: &c.qkv,
                    width: c.width,
                    sinks: c.sinks.as_deref(),
                    distances: c.distances.as_deref(),
                };
                let want = attend_naive(&c.shape, &c.cache, &input);
                let scalar = run(&c, Isa::SCALAR, 2);
                for (got, want) in scalar.iter().zip(&want) {
                    assert!(
                        (f64::from(*got) - want).abs() < 2e-5,
                        "{kind:?} {heads}/{kv} x {dim}: {got} for {want}"
                    );
                }
                for isa in Isa::available() {
                    assert_eq!(run(&c, isa, 2), scalar, "{kind:?} {}", isa.name());
                }
            }
        }
    }

    #[test]
    fn int8_pages_give_nearly_what_f16_pages_give() {
        let of = |kind| {
            let c = case(kind, 9, 3, 64, None, None);
            run(&c, Isa::detect(), 2)
        };
        let (f16, int8) = (of(KvType::F16), of(KvType::Int8));
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
        let apart = norm(&mut f16.iter().zip(&int8).map(|(a, b)| a - b));
        let part = apart / norm(&mut f16.iter().copied());
        assert!(part > 0.0 && part < 0.02, "{part} apart");
    }

    #[test]
    fn a_query_does_not_depend_on_its_company_or_on_threads() {
        for kind in KINDS {
            let c = case(kind, 9, 3, 64, Some(20), None);
            let together = run(&c, Isa::detect(), 2);
            assert_eq!(run(&c, Isa::detect(), 5), together);
            let width = c.shape.heads * c.shape.head_dim;
            for row in 0..21 {
                let span = Span {
                    first_row: 0,
                    rows: 1,
                    start: 40 + row,
                    ..c.spans[0]
                };
                let q = &c.qkv[row * c.width..][..c.width];
                let input = AttentionInput {
                    spans: &[span],
                    pages: &c.pages,
                    q,
                    width: c.width,
                    sinks: c.sinks.as_deref(),
                    distances: c.distances.as_deref(),
                };
                let mut alone = vec![0.0; width];
                let plan = &mut AttentionPlan::default();
                attend(
                    Isa::detect(),
                    &Pool::new(1),
                    plan,
                    &c.shape,
                    &c.cache,
                    &input,
                    &mut alone,
                );
                assert_eq!(alone, together[row * width..][..width], "row {row}");
            }
        }
    }

    /// One sequence of 700 positions: three chunks.
    fn long_case(kind: KvType, window: Option<usize>) -> Case {
        let (heads, kv_heads, dim) = (6, 2, 32);
        let mut cache = KvLayer::new(kind, 44, kv_heads, dim);
        let width = (heads + 2 * kv_heads) * dim;
        let pages: Vec<u32> = (0..44).map(|i| i * 13 % 44).collect();
        let span = Span {
            first_row: 0,
            rows: 700,
            first_page: 0,
            pages: 44,
            start: 0,
            long: false,
        };
        let qkv = numbers(700 * width, 3);
        let pool = Pool::new(2);
        cache.store(
            Isa::detect(),
            &pool,
            &[span],
            &pages,
            &qkv,
            width,
            heads * dim,
        );
        Case {
            shape: AttentionShape {
                heads,
                kv_heads,
                head_dim: dim,
                scale: 0.3,
                softcap: None,
                window,
                both_ways: false,
            },
            cache,
            spans: vec![span],
            pages,
            qkv,
            width,
            sinks: None,
            distances: None,
        }
    }

    #[test]
    fn queries_of_an_encoder_see_all_of_their_span_or_a_window_of_it() {
        let windows = [None, Some(20), Some(290)];
        for (kind, rows, window) in KINDS.iter().flat_map(|kind| {
            let rows = [1, 5, 37, 300].iter();
            rows.flat_map(move |n| windows.map(|w| (*kind, *n, w)))
        }) {
            let mut c = long_case(kind, window);
            c.shape.both_ways = true;
            c.distances = window.map(|_| numbers(c.shape.heads * 2 * 304, 8));
            // Two whole sequences, in the pages of the one.
            c.spans = [(0, 0, rows), (rows, 19, 17)]
                .map(|(first_row, first_page, rows)| Span {
                    first_row,
                    rows,
                    first_page,
                    pages: rows.div_ceil(PAGE),
                    start: 0,
                    long: false,
                })
                .to_vec();
            let input = AttentionInput {
                spans: &c.spans,
                pages: &c.pages,
                q: &c.qkv,
                width: c.width,
                sinks: None,
                distances: c.distances.as_deref(),
            };
            let definition = attend_naive(&c.shape, &c.cache, &input);
            let mut scalar: Option<Vec<f32>> = None;
            for isa in [Isa::SCALAR].into_iter().chain(Isa::available()) {
                let mut out = vec![0.0; definition.len()];
                let plan = &mut AttentionPlan::default();
                attend(
                    isa,
                    &Pool::new(2),
                    plan,
                    &c.shape,
                    &c.cache,
                    &input,
                    &mut out,
                );
                for (got, want) in out.iter().zip(&definition) {
                    assert!((f64::from(*got) - want).abs() < 2e-5, "{got} for {want}");
                }
                let scalar = scalar.get_or_insert_with(|| out.clone());
                assert_eq!(&out, scalar, "{}", isa.name());
            }
        }
    }

    #[test]
    fn chunks_give_the_definition_and_the_same_bits_shared_or_not() {
        let windows = [None, Some(300), Some(9)];
        for (kind, window) in KINDS.iter().flat_map(|kind| windows.map(|w| (*kind, w))) {
            let mut c = long_case(kind, window);
            c.sinks = window.map(|_| vec![-5.0, -1.0, 0.0, 1.0, 2.0, 9.0]);
            let last = 690..700;
            let width = c.shape.heads * c.shape.head_dim;
            let rows = |spans: &[Span], isa, threads| {
                let input = AttentionInput {
                    spans,
                    pages: &c.pages,
                    q: &c.qkv[last.start * c.width..],
                    width: c.width,
                    sinks: c.sinks.as_deref(),
                    distances: c.distances.as_deref(),
                };
                let mut out = vec![0.0; 10 * width];
                let plan = &mut AttentionPlan::default();
                attend(
                    isa,
                    &Pool::new(threads),
                    plan,
                    &c.shape,
                    &c.cache,
                    &input,
                    &mut out,
                );
                (out, attend_naive(&c.shape, &c.cache, &input))
            };
            let span = Span {
                rows: 10,
                start: last.start,
                ..c.spans[0]
            };
            let (want, definition) = rows(&[span], Isa::SCALAR, 1);
            for (got, want) in want.iter().zip(&definition) {
                assert!((f64::from(*got) - want).abs() < 2e-5, "{got} for {want}");
            }
            let alone: Vec<Span> = (0..10)
                .map(|i| Span {
                    first_row: i,
                    rows: 1,
                    start: last.start + i,
                    ..c.spans[0]
                })
                .collect();
            for isa in Isa::available() {
                // Two threads share the chunks of a span of one row; many rows are each one unit's.
                for threads in [1, 2, 9, 33] {
                    assert_eq!(rows(&[span], isa, threads).0, want, "{}", isa.name());
                    assert_eq!(rows(&alone, isa, threads).0, want, "{}", isa.name());
                }
            }
        }
    }
}

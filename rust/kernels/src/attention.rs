//! Attention over a paged cache of f16 keys and values, in chunks of positions.
//!
//! Each chunk is softened by itself, and chunks are added up in order (Milakov and Gimelshein 2018, arXiv:1805.02867).
//! They lie at fixed positions: a query's bits depend on nothing but itself, neither on who else is in the step nor on
//! how many threads share its chunks.

#![expect(
    clippy::needless_range_loop,
    reason = "one index runs over several register arrays at once"
)]

use crate::elementwise::exp;
use crate::pool::{Pool, SendPtr};
use crate::quant::f16_to_f32;
use crate::simd::{Isa, LANES, Simd, dispatch, prefetch, store_part};

pub use crate::kv::{KvLayer, PAGE, Span};

/// Queries that share the reading of keys and values; also the most that one call of the kernel takes.
const GROUP: usize = 8;

/// Pages and positions of a chunk.
const PAGES: usize = 16;
const CHUNK: usize = PAGES * PAGE;

/// Pages that are fetched ahead where every key is read once: pages of one head do not lie side by side, so that the
/// CPU's own prefetching does not see the next one coming.
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
    /// A query sees the last `window` positions, its own among them.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// The positions that a query at `position` sees.
    fn visible(&self, position: usize) -> std::ops::Range<usize> {
        let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        first..position + 1
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
        let groups = |span: &Span| (span.rows * shape.group()).div_ceil(GROUP);
        let groups: usize = spans.iter().map(groups).sum::<usize>() * shape.kv_heads;
        // Enough units for the threads: where there are few queries, they share one's chunks.
        let parts = (4 * threads).div_ceil(groups.max(1));
        let parts = if threads == 1 { 1 } else { parts };
        let mut sums = 0;
        for (i, span) in spans.iter().enumerate() {
            let queries = span.rows * shape.group();
            for kv_head in 0..shape.kv_heads {
                for first in (0..queries).step_by(GROUP) {
                    let count = GROUP.min(queries - first);
                    let row = |query: usize| span.start + query / shape.group();
                    let seen = (
                        shape.visible(row(first)).start / CHUNK,
                        row(first + count - 1) / CHUNK + 1,
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
    pool.run(units.len(), |i| {
        // SAFETY: bounds were checked above; a unit's queries, or its chunks of them, are its own.
        unsafe { attend_unit(isa, &task, units[i], sums.get(), out.get()) }
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

/// What all units of a step read.
struct Task<'a> {
    shape: &'a AttentionShape,
    cache: &'a KvLayer,
    input: &'a AttentionInput<'a>,
}

impl Task<'_> {
    /// Row in the step, head and position of a unit's query.
    fn query(&self, unit: &Unit, i: usize) -> (usize, usize, usize) {
        let (span, group) = (&self.input.spans[unit.span], self.shape.group());
        let row = (unit.first + i) / group;
        let head = unit.kv_head * group + (unit.first + i) % group;
        (span.first_row + row, head, span.start + row)
    }

    /// Floats of one query's sums over one chunk: values, then the sum of the weights and their maximum.
    fn width(&self) -> usize {
        self.cache.padded + LANES
    }
}

dispatch! {
    unsafe fn attend_unit<>(task: &Task, unit: Unit, sums: *mut f32, out: *mut f32) = unit_body
}

#[inline(always)]
unsafe fn unit_body<S: Simd>(task: &Task, unit: Unit, sums: *mut f32, out: *mut f32) {
    unsafe {
        match unit.count {
            1 => queries::<S, 1>(task, unit, sums, out),
            2 => queries::<S, 2>(task, unit, sums, out),
            3 => queries::<S, 3>(task, unit, sums, out),
            4 => queries::<S, 4>(task, unit, sums, out),
            5 => queries::<S, 5>(task, unit, sums, out),
            6 => queries::<S, 6>(task, unit, sums, out),
            7 => queries::<S, 7>(task, unit, sums, out),
            _ => queries::<S, GROUP>(task, unit, sums, out),
        }
    }
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
                add_chunk::<S>(&mut running, &mut total, of, from);
            }
        }
        // SAFETY: a query's outputs are its own.
        unsafe { finish::<S>(task, &unit, i, &running, &total, out) };
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

/// Add a chunk's sums to those of the chunks before it. A chunk that a query does not see changes no bit.
#[inline(always)]
unsafe fn add_chunk<S: Simd>(
    running: &mut Running,
    total: &mut [f32],
    of: Running,
    values: *const f32,
) {
    if of.sum == 0.0 {
        return;
    }
    let max = if of.max > running.max {
        of.max
    } else {
        running.max
    };
    // The first chunk has nothing before it: exp would make 0 times infinity of it.
    let old = if running.sum == 0.0 {
        0.0
    } else {
        exp(running.max - max)
    };
    let new = exp(of.max - max);
    running.max = max;
    running.sum = new.mul_add(of.sum, running.sum * old);
    for c in (0..total.len()).step_by(LANES) {
        // SAFETY: both have whole vectors.
        unsafe {
            let to = total.as_mut_ptr().add(c);
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
    total: &[f32],
    out: *mut f32,
) {
    let (row, head, _) = task.query(unit, i);
    let dim = task.shape.head_dim;
    // SAFETY: `out` has `dim` floats for every row and head; `total` has whole vectors.
    unsafe {
        let out = out.add((row * task.shape.heads + head) * dim);
        let out = std::slice::from_raw_parts_mut(out, dim);
        for at in (0..dim).step_by(LANES) {
            let x = S::div(S::load_f32(total.as_ptr().add(at)), S::splat(running.sum));
            store_part::<S>(out, at, x);
        }
    }
}

/// `Q` queries of one kv head against the pages of the unit's chunks that any of them sees. A page that one of them does
/// not see leaves its bits alone: its weights there are exactly zero, and the cache holds only finite numbers.
#[inline(always)]
unsafe fn queries<S: Simd, const Q: usize>(task: &Task, unit: Unit, sums: *mut f32, out: *mut f32) {
    let Task {
        shape,
        cache,
        input,
    } = task;
    let (dim, padded) = (shape.head_dim, cache.padded);
    let span = &input.spans[unit.span];
    let mut q = [std::ptr::null::<f32>(); Q];
    let mut position = [0usize; Q];
    for i in 0..Q {
        let (row, head, at) = task.query(&unit, i);
        position[i] = at;
        // SAFETY: rows and heads are inside `q`, checked by `attend`.
        q[i] = unsafe { input.q.as_ptr().add(row * input.width + head * dim) };
    }
    let first_page = shape.visible(position[0]).start / PAGE;
    let last_page = position[Q - 1] / PAGE;
    // Sums of values of a chunk and of all, `[query][padded]`: on the stack for ordinary heads.
    let mut small = [0f32; 2 * GROUP * 256];
    let mut large = Vec::new();
    let memory: &mut [f32] = if 2 * Q * padded <= small.len() {
        &mut small[..2 * Q * padded]
    } else {
        large.resize(2 * Q * padded, 0.0);
        &mut large
    };
    let (acc, total) = memory.split_at_mut(Q * padded);
    let mut running = [Running::default(); Q];
    let mut weights = [[0f32; CHUNK]; Q];
    for chunk in unit.chunks.0..unit.chunks.1 {
        let from = first_page.max(chunk * PAGES);
        let to = (last_page + 1).min((chunk + 1) * PAGES);
        let number = |page: usize| input.pages[span.first_page + page] as usize;
        // Where all is read once, fetch ahead.
        let ahead =
            |page: usize| (span.rows == 1 && page + AHEAD < to).then(|| number(page + AHEAD));
        for page in from..to {
            if let Some(next) = ahead(page) {
                prefetch(cache.keys(next, unit.kv_head));
            }
            // SAFETY: a page's keys are `dim * PAGE`, and its scores have room in `weights`.
            unsafe {
                let keys = cache.keys(number(page), unit.kv_head).as_ptr();
                scores::<S, Q>(
                    &q,
                    keys,
                    dim,
                    shape.scale,
                    (page % PAGES) * PAGE,
                    &mut weights,
                );
            }
        }
        let mut of = [Running::default(); Q];
        for i in 0..Q {
            let seen = &mut weights[i][(from % PAGES) * PAGE..][..(to - from) * PAGE];
            // SAFETY: slices.
            of[i] = unsafe { soften::<S>(shape, seen, from * PAGE, shape.visible(position[i])) };
        }
        acc.fill(0.0);
        for page in from..to {
            if let Some(next) = ahead(page) {
                prefetch(cache.values(next, unit.kv_head));
            }
            // SAFETY: a page's values are `PAGE * padded`; `acc` is `Q * padded` long.
            unsafe {
                let values = cache.values(number(page), unit.kv_head).as_ptr();
                add_values::<S, Q>(
                    &weights,
                    (page % PAGES) * PAGE,
                    values,
                    padded,
                    acc.as_mut_ptr(),
                );
            }
        }
        for i in 0..Q {
            let acc = &acc[i * padded..][..padded];
            if unit.whole() {
                let total = &mut total[i * padded..][..padded];
                // SAFETY: both are `padded` long.
                unsafe { add_chunk::<S>(&mut running[i], total, of[i], acc.as_ptr()) };
                continue;
            }
            let at = i * (unit.seen.1 - unit.seen.0) + chunk - unit.seen.0;
            // SAFETY: `fill` made room for all chunks of all queries, and this chunk is this unit's.
            unsafe {
                let to = sums.add(unit.sums + at * task.width());
                std::ptr::copy_nonoverlapping(acc.as_ptr(), to, padded);
                *to.add(padded) = of[i].sum;
                *to.add(padded + 1) = of[i].max;
            }
        }
    }
    if unit.whole() {
        for i in 0..Q {
            // SAFETY: a query's outputs are its own.
            unsafe {
                finish::<S>(
                    task,
                    &unit,
                    i,
                    &running[i],
                    &total[i * padded..][..padded],
                    out,
                )
            };
        }
    }
}

/// Scaled dot products of `Q` queries with the sixteen keys of a page, to `out[..][at..]`.
#[inline(always)]
unsafe fn scores<S: Simd, const Q: usize>(
    q: &[*const f32; Q],
    keys: *const u16,
    dim: usize,
    scale: f32,
    at: usize,
    out: &mut [[f32; CHUNK]; Q],
) {
    unsafe {
        // Two chains, even and odd dimensions: one alone would wait for its own latency.
        let mut even = [S::splat(0.0); Q];
        let mut odd = [S::splat(0.0); Q];
        let mut d = 0;
        while d + 1 < dim {
            let (k0, k1) = (
                S::load_f16(keys.add(d * PAGE)),
                S::load_f16(keys.add((d + 1) * PAGE)),
            );
            for i in 0..Q {
                even[i] = S::fma(k0, S::splat(*q[i].add(d)), even[i]);
                odd[i] = S::fma(k1, S::splat(*q[i].add(d + 1)), odd[i]);
            }
            d += 2;
        }
        if d < dim {
            let k = S::load_f16(keys.add(d * PAGE));
            for i in 0..Q {
                even[i] = S::fma(k, S::splat(*q[i].add(d)), even[i]);
            }
        }
        for i in 0..Q {
            let sum = S::mul(S::add(even[i], odd[i]), S::splat(scale));
            S::store(out[i].as_mut_ptr().add(at), sum);
        }
    }
}

/// Turn the scores of whole pages from position `first` on into weights relative to their maximum; invisible ones become 0.
#[inline(always)]
unsafe fn soften<S: Simd>(
    shape: &AttentionShape,
    scores: &mut [f32],
    first: usize,
    visible: std::ops::Range<usize>,
) -> Running {
    if let Some(cap) = shape.softcap {
        for s in scores.iter_mut() {
            // tanh(t) = 1 - 2 / (exp(2 t) + 1)
            *s = cap * (1.0 - 2.0 / (exp(2.0 * *s / cap) + 1.0));
        }
    }
    let seen = |position: usize| position.clamp(first, first + scores.len()) - first;
    let (from, to) = (seen(visible.start), seen(visible.end));
    scores[..from].fill(f32::NEG_INFINITY);
    scores[to..].fill(f32::NEG_INFINITY);
    // SAFETY: whole pages, a vector each.
    unsafe {
        let mut lanes = S::splat(f32::NEG_INFINITY);
        for page in scores.chunks_exact(LANES) {
            lanes = S::max(lanes, S::load_f32(page.as_ptr()));
        }
        let max = S::largest(lanes);
        let mut sums = S::splat(0.0);
        for page in scores.chunks_exact_mut(LANES) {
            let s = S::load_f32(page.as_ptr());
            let weight = S::exp(S::add(s, S::splat(-max)));
            let weight = S::keep_unequal(weight, s, S::splat(f32::NEG_INFINITY));
            sums = S::add(sums, weight);
            S::store(page.as_mut_ptr(), weight);
        }
        Running {
            sum: S::sum(sums),
            max,
        }
    }
}

/// `acc += weights[..][at..] * values`, sixteen dimensions at a time.
#[inline(always)]
unsafe fn add_values<S: Simd, const Q: usize>(
    weights: &[[f32; CHUNK]; Q],
    at: usize,
    values: *const u16,
    padded: usize,
    acc: *mut f32,
) {
    unsafe {
        for c in (0..padded).step_by(LANES) {
            let mut sums = [S::splat(0.0); Q];
            for i in 0..Q {
                sums[i] = S::load_f32(acc.add(i * padded + c));
            }
            for j in 0..PAGE {
                let v = S::load_f16(values.add(j * padded + c));
                for i in 0..Q {
                    sums[i] = S::fma(v, S::splat(*weights[i].as_ptr().add(at + j)), sums[i]);
                }
            }
            for i in 0..Q {
                S::store(acc.add(i * padded + c), sums[i]);
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
            let (row, position) = (span.first_row + i, span.start + i);
            let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for head in 0..shape.heads {
                let q = &input.q[row * input.width + head * dim..][..dim];
                let key =
                    |p: usize, d: usize| cache.keys(page(p), head / group)[d * PAGE + p % PAGE];
                let value = |p: usize, d: usize| {
                    cache.values(page(p), head / group)[p % PAGE * cache.padded + d]
                };
                let score = |p: usize| {
                    let dot: f64 = (0..dim)
                        .map(|d| f64::from(q[d]) * f64::from(f16_to_f32(key(p, d))))
                        .sum();
                    let s = dot * f64::from(shape.scale);
                    shape
                        .softcap
                        .map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
                };
                let scores: Vec<f64> = (first..=position).map(score).collect();
                let max = scores.iter().cloned().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for (p, s) in (first..=position).zip(&scores) {
                    for d in 0..dim {
                        out[(row * shape.heads + head) * dim + d] +=
                            (s - max).exp() / sum * f64::from(f16_to_f32(value(p, d)));
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
    }

    /// Two sequences, one with a past, whose pages lie scattered; keys and values of all positions stored.
    fn case(
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
            scale: 0.3,
            softcap,
            window,
        };
        let mut cache = KvLayer::new(16, kv_heads, dim);
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
        }
    }

    fn run(c: &Case, isa: Isa, threads: usize) -> Vec<f32> {
        let input = AttentionInput {
            spans: &c.spans,
            pages: &c.pages,
            q: &c.qkv,
            width: c.width,
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

    #[test]
    fn attention_is_the_definition_on_every_path() {
        for (heads, kv, dim, window, softcap) in [
            (9, 3, 64, None, None),
            (4, 2, 24, Some(32), None),
            (4, 1, 256, Some(7), None),
            (2, 2, 31, None, Some(5.0)),
        ] {
            let c = case(heads, kv, dim, window, softcap);
            let input = AttentionInput {
                spans: &c.spans,
                pages: &c.pages,
                q: &c.qkv,
                width: c.width,
            };
            let want = attend_naive(&c.shape, &c.cache, &input);
            let scalar = run(&c, Isa::SCALAR, 2);
            for (got, want) in scalar.iter().zip(&want) {
                assert!(
                    (f64::from(*got) - want).abs() < 2e-5,
                    "{heads}/{kv} x {dim}: {got} for {want}"
                );
            }
            for isa in Isa::available() {
                assert_eq!(run(&c, isa, 2), scalar, "{}", isa.name());
            }
        }
    }

    #[test]
    fn a_query_does_not_depend_on_its_company_or_on_threads() {
        let c = case(9, 3, 64, Some(20), None);
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

    /// One sequence of 700 positions: three chunks.
    fn long_case(window: Option<usize>) -> Case {
        let (heads, kv_heads, dim) = (6, 2, 32);
        let mut cache = KvLayer::new(44, kv_heads, dim);
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
            },
            cache,
            spans: vec![span],
            pages,
            qkv,
            width,
        }
    }

    #[test]
    fn chunks_give_the_definition_and_the_same_bits_shared_or_not() {
        for window in [None, Some(300), Some(9)] {
            let c = long_case(window);
            let last = 690..700;
            let width = c.shape.heads * c.shape.head_dim;
            let rows = |spans: &[Span], isa, threads| {
                let input = AttentionInput {
                    spans,
                    pages: &c.pages,
                    q: &c.qkv[last.start * c.width..],
                    width: c.width,
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

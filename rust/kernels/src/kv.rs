//! The cache of keys and values: f16 or int8, in pages, keys transposed inside their page. Knows nothing of attention.

use crate::pool::{Pool, SendPtr};
use crate::quant::f16_to_f32;
use crate::simd::{Isa, LANES, Simd, dispatch, load_part};

/// Positions in a page: one vector of keys per head dimension.
pub const PAGE: usize = LANES;

/// Rows that one unit of work stores for one head.
const ROWS: usize = 64;

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Its first row in the step, and how many.
    pub first_row: usize,
    pub rows: usize,
    /// Its block table inside the step's `pages`: page `i` holds positions `i * PAGE ..`.
    pub first_page: usize,
    pub pages: usize,
    /// The position of its first row; everything before is already in the cache.
    pub start: usize,
    /// The sequence counts as long for rope scalings that distinguish (longrope).
    pub long: bool,
}

/// What the numbers of the cache are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    #[default]
    F16,
    /// Whole numbers up to 127, times a scale for each position and head: the largest of its numbers / 127.
    Int8,
}

impl KvType {
    /// All of them, as users name them.
    pub const NAMES: [(&str, KvType); 2] = [("f16", KvType::F16), ("int8", KvType::Int8)];

    /// Bytes of one head of a page: its scales, then `dim` numbers of each position; whole cache lines.
    const fn size(self, dim: usize) -> usize {
        let size = match self {
            KvType::F16 => F16::SCALES + PAGE * dim * F16::BYTES,
            KvType::Int8 => I8::SCALES + PAGE * dim * I8::BYTES,
        };
        size.next_multiple_of(LINE)
    }
}

/// Bytes of a cache line, which no vector of the cache goes beyond.
const LINE: usize = 64;

/// A [`KvType`] at compile time: how its numbers are read.
pub(crate) trait Stored: Copy {
    /// Bytes of a number, and of the scales before a page's numbers.
    const BYTES: usize;
    const SCALES: usize;

    /// Sixteen numbers, without their scales.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

#[derive(Clone, Copy)]
pub(crate) struct F16;
impl Stored for F16 {
    const BYTES: usize = 2;
    const SCALES: usize = 0;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: sixteen numbers lie there, says the caller.
        unsafe { S::load_f16(p.cast()) }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct I8;
impl Stored for I8 {
    const BYTES: usize = 1;
    const SCALES: usize = 4 * PAGE;

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: sixteen numbers lie there, says the caller.
        unsafe { S::load_i8(p) }
    }
}

/// Zeroed bytes from a cache line's beginning on.
struct Lines {
    bytes: Vec<u8>,
    start: usize,
}

impl Lines {
    fn new(size: usize) -> Self {
        let bytes = vec![0; size + LINE];
        let start = bytes.as_ptr().align_offset(LINE);
        Self { bytes, start }
    }

    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.bytes[self.start..].as_mut_ptr()
    }

    /// The `i`-th piece of `size` bytes.
    fn piece(&self, i: usize, size: usize) -> &[u8] {
        &self.bytes[self.start + i * size..][..size]
    }

    fn piece_mut(&mut self, i: usize, size: usize) -> &mut [u8] {
        &mut self.bytes[self.start + i * size..][..size]
    }
}

/// The cache of one layer: keys `[page][kv_head][dim][PAGE]`, values `[page][kv_head][dim / 16][PAGE][16]`, before each
/// page's and head's the scales `[PAGE]` if the type has any, as f32.
pub struct KvLayer {
    pages: usize,
    pub(crate) kind: KvType,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// `head_dim` up to whole vectors.
    pub(crate) padded: usize,
    keys: Lines,
    values: Lines,
}

impl KvLayer {
    /// Room for `pages` pages. Memory is taken from the system only as pages are first written.
    pub fn new(kind: KvType, pages: usize, kv_heads: usize, head_dim: usize) -> Self {
        let padded = head_dim.next_multiple_of(LANES);
        Self {
            pages,
            kind,
            kv_heads,
            head_dim,
            padded,
            keys: Lines::new(pages * kv_heads * kind.size(head_dim)),
            values: Lines::new(pages * kv_heads * kind.size(padded)),
        }
    }

    /// Bytes that one page takes in one layer.
    pub fn page_bytes(kind: KvType, kv_heads: usize, head_dim: usize) -> usize {
        kv_heads * (kind.size(head_dim) + kind.size(head_dim.next_multiple_of(LANES)))
    }

    /// [`Self::page_bytes`] of this layer.
    pub fn bytes_of_page(&self) -> usize {
        Self::page_bytes(self.kind, self.kv_heads, self.head_dim)
    }

    /// Add the bytes of a page to `out`: keys, then values, of all heads.
    ///
    /// # Panics
    /// When the page is beyond the cache.
    pub fn read_page(&self, page: usize, out: &mut Vec<u8>) {
        for (lines, size) in [(&self.keys, self.head_dim), (&self.values, self.padded)] {
            out.extend_from_slice(lines.piece(page, self.kv_heads * self.kind.size(size)));
        }
    }

    /// Overwrite a page with bytes of [`Self::read_page`], as many as [`Self::page_bytes`] says; the others are left.
    ///
    /// # Panics
    /// When the page is beyond the cache, or there are fewer bytes.
    pub fn write_page<'a>(&mut self, page: usize, mut bytes: &'a [u8]) -> &'a [u8] {
        let (kind, heads) = (self.kind, self.kv_heads);
        for (lines, dim) in [
            (&mut self.keys, self.head_dim),
            (&mut self.values, self.padded),
        ] {
            let (own, rest) = bytes.split_at(heads * kind.size(dim));
            lines.piece_mut(page, own.len()).copy_from_slice(own);
            bytes = rest;
        }
        bytes
    }

    /// Write the keys and values of all rows of a step. Rows are `[.. | k | v]` with keys starting at `offset`.
    ///
    /// # Panics
    /// When a page number is beyond the cache, or a span beyond the rows: defects of the caller.
    #[expect(
        clippy::too_many_arguments,
        reason = "a step's parts are slices of the caller's"
    )]
    pub fn store(
        &mut self,
        isa: Isa,
        pool: &Pool,
        spans: &[Span],
        pages: &[u32],
        qkv: &[f32],
        width: usize,
        offset: usize,
    ) {
        self.check_pages(spans, pages);
        let rows: usize = spans.iter().map(|s| s.rows).sum();
        let kv_heads = self.kv_heads;
        assert!(qkv.len() >= rows * width && width >= offset + 2 * kv_heads * self.head_dim);
        let to = Places {
            keys: SendPtr(self.keys.as_mut_ptr()),
            values: SendPtr(self.values.as_mut_ptr()),
            kv_heads,
            dim: self.head_dim,
            sizes: (self.kind.size(self.head_dim), self.kind.size(self.padded)),
        };
        let kind = self.kind;
        let store = |unit: usize| {
            let (head, block) = (unit % kv_heads, unit / kv_heads * ROWS);
            for span in spans {
                let first = block.max(span.first_row);
                let last = (block + ROWS).min(span.first_row + span.rows);
                for row in first..last.max(first) {
                    let position = span.start + row - span.first_row;
                    let page = pages[span.first_page + position / PAGE] as usize;
                    let row = &qkv[row * width + offset..][..2 * kv_heads * to.dim];
                    // SAFETY: the page is inside the cache (checked above), and each unit has rows and heads of
                    // its own, whose slots nobody else writes.
                    unsafe {
                        let (at, slot) = (page * kv_heads + head, position % PAGE);
                        match kind {
                            KvType::F16 => store_f16(isa, &to, at, slot, head, row),
                            KvType::Int8 => store_int8(isa, &to, at, slot, head, row),
                        }
                    }
                }
            }
        };
        let units = kv_heads * rows.div_ceil(ROWS);
        if rows * kv_heads * to.dim < 4096 {
            (0..units).for_each(store);
        } else {
            pool.run(units, store);
        }
    }

    /// `out[i] += by[i] * x[i]` of the numbers that were stored for a position, `[k | v]`, in all heads: the cache as it
    /// serves who looks back at a few positions only (short convolutions).
    ///
    /// # Panics
    /// When the page is beyond the cache, or there are fewer numbers.
    pub fn add_row(&self, page: usize, slot: usize, by: &[f32], out: &mut [f32]) {
        let (dim, width) = (self.head_dim, self.kv_heads * self.head_dim);
        for head in 0..self.kv_heads {
            let (keys, values) = (self.keys(page, head), self.values(page, head));
            let of = |first: usize| first + head * dim..first + (head + 1) * dim;
            let lane = |d: usize| (d / LANES * PAGE + slot) * LANES + d % LANES;
            for (d, (out, by)) in out[of(0)].iter_mut().zip(&by[of(0)]).enumerate() {
                *out += by * self.number(keys, slot, d * PAGE + slot);
            }
            for (d, (out, by)) in out[of(width)].iter_mut().zip(&by[of(width)]).enumerate() {
                *out += by * self.number(values, slot, lane(d));
            }
        }
    }

    /// # Panics
    /// When a span's table has too few pages, or one beyond the cache.
    pub(crate) fn check_pages(&self, spans: &[Span], pages: &[u32]) {
        for span in spans {
            let needed = (span.start + span.rows).div_ceil(PAGE);
            assert!(
                needed <= span.pages,
                "{needed} pages of positions in a table of {}",
                span.pages
            );
            let table = &pages[span.first_page..span.first_page + span.pages];
            assert!(
                table[..needed].iter().all(|&p| (p as usize) < self.pages),
                "page beyond the cache of {}",
                self.pages
            );
        }
    }

    /// The keys of a page and head: scales, then `[dim][PAGE]`.
    pub(crate) fn keys(&self, page: usize, head: usize) -> &[u8] {
        let size = self.kind.size(self.head_dim);
        self.keys.piece(page * self.kv_heads + head, size)
    }

    /// The values of a page and head: scales, then `[padded / 16][PAGE][16]`.
    pub(crate) fn values(&self, page: usize, head: usize) -> &[u8] {
        let size = self.kind.size(self.padded);
        self.values.piece(page * self.kv_heads + head, size)
    }

    /// One number of a position's key: the definition of the layout, for tests.
    pub(crate) fn key(&self, page: usize, head: usize, slot: usize, d: usize) -> f32 {
        self.number(self.keys(page, head), slot, d * PAGE + slot)
    }

    /// One number of a position's value.
    pub(crate) fn value(&self, page: usize, head: usize, slot: usize, d: usize) -> f32 {
        let at = (d / LANES * PAGE + slot) * LANES + d % LANES;
        self.number(self.values(page, head), slot, at)
    }

    fn number(&self, piece: &[u8], slot: usize, at: usize) -> f32 {
        match self.kind {
            KvType::F16 => f16_to_f32(u16::from_le_bytes([piece[2 * at], piece[2 * at + 1]])),
            KvType::Int8 => {
                let scale = &piece[4 * slot..][..4];
                let scale = f32::from_ne_bytes([scale[0], scale[1], scale[2], scale[3]]);
                scale * f32::from(piece[I8::SCALES + at] as i8)
            }
        }
    }
}

/// Where rows are stored.
struct Places {
    keys: SendPtr<u8>,
    values: SendPtr<u8>,
    kv_heads: usize,
    dim: usize,
    /// Bytes of one head's keys of a page, and of its values.
    sizes: (usize, usize),
}

impl Places {
    /// The key and the value of a head in a row `[k | v]`.
    fn split<'a>(&self, head: usize, row: &'a [f32]) -> (&'a [f32], &'a [f32]) {
        let (k, v) = row.split_at(self.kv_heads * self.dim);
        let of_head = |x: &'a [f32]| &x[head * self.dim..][..self.dim];
        (of_head(k), of_head(v))
    }
}

// Both store one head of one row `[k | v]` to slot `slot` of the `at`-th pair of page and head. A NaN in it, of the key or
// of the value, makes NaN of the key alone: who sees the position knows of it, and who does not multiplies by a number.
dispatch! {
    unsafe fn store_f16<>(to: &Places, at: usize, slot: usize, head: usize, row: &[f32]) = f16_body
}
dispatch! {
    unsafe fn store_int8<>(to: &Places, at: usize, slot: usize, head: usize, row: &[f32]) = int8_body
}

#[inline(always)]
unsafe fn f16_body<S: Simd>(to: &Places, at: usize, slot: usize, head: usize, row: &[f32]) {
    let (k, v) = to.split(head, row);
    let nan = v.iter().any(|x| x.is_nan());
    // SAFETY: `at` and `slot` are inside the cache, says the caller; `dim` is the length of both slices. Pieces begin
    // with cache lines, so that numbers are aligned.
    unsafe {
        let keys = to.keys.get().add(at * to.sizes.0).cast::<u16>();
        let values = to.values.get().add(at * to.sizes.1).cast::<u16>();
        let mut codes = [0u16; LANES];
        for (c, x) in k.chunks(LANES).enumerate() {
            narrow::<S>(x, &mut codes);
            for (d, &code) in codes[..x.len()].iter().enumerate() {
                *keys.add((c * LANES + d) * PAGE + slot) = code;
            }
        }
        for (c, x) in v.chunks(LANES).enumerate() {
            narrow::<S>(x, &mut codes);
            let values = values.add((c * PAGE + slot) * LANES);
            values.copy_from_nonoverlapping(codes.as_ptr(), x.len());
        }
        if nan {
            *keys.add(slot) = F16_NAN;
            for (d, _) in v.iter().enumerate().filter(|(_, x)| x.is_nan()) {
                *values.add((d / LANES * PAGE + slot) * LANES + d % LANES) = 0;
            }
        }
    }
}

const F16_NAN: u16 = 0x7E00;

#[inline(always)]
unsafe fn int8_body<S: Simd>(to: &Places, at: usize, slot: usize, head: usize, row: &[f32]) {
    let (k, v) = to.split(head, row);
    let nan = row_has_nan(k, v);
    // SAFETY: as in `f16_body`; the scales lie before the numbers.
    unsafe {
        let keys = to.keys.get().add(at * to.sizes.0);
        let values = to.values.get().add(at * to.sizes.1);
        let mut codes = [0i8; LANES];
        let (scale, inverse) = scales::<S>(k);
        *keys.cast::<f32>().add(slot) = if nan { f32::NAN } else { scale };
        for (c, x) in (0..k.len()).step_by(LANES).zip(k.chunks(LANES)) {
            round::<S>(k, c, inverse, &mut codes);
            for (d, &code) in codes[..x.len()].iter().enumerate() {
                *keys.add(I8::SCALES + (c + d) * PAGE + slot) = code as u8;
            }
        }
        let (scale, inverse) = scales::<S>(v);
        *values.cast::<f32>().add(slot) = scale;
        for (c, x) in (0..v.len()).step_by(LANES).zip(v.chunks(LANES)) {
            round::<S>(v, c, inverse, &mut codes);
            let values = values.add(I8::SCALES + c * PAGE + slot * LANES);
            values.copy_from_nonoverlapping(codes.as_ptr().cast(), x.len());
        }
    }
}

fn row_has_nan(k: &[f32], v: &[f32]) -> bool {
    k.iter().chain(v).any(|x| x.is_nan())
}

/// The scale of a row's codes, and what its numbers are multiplied by to be codes. Both types hold the same range.
#[inline(always)]
unsafe fn scales<S: Simd>(x: &[f32]) -> (f32, f32) {
    // SAFETY: slices.
    let largest = unsafe {
        let mut lanes = S::splat(0.0);
        for at in (0..x.len()).step_by(LANES) {
            lanes = S::max(lanes, S::abs(load_part::<S>(x, at)));
        }
        S::largest(lanes).min(LARGEST)
    };
    // Below this all is 0: the inverse would overflow.
    if largest < 1e-30 {
        return (0.0, 0.0);
    }
    (largest / 127.0, 127.0 / largest)
}

/// The largest number of f16.
const LARGEST: f32 = 65504.0;

/// Up to sixteen codes of `x` from `at` on, to nearest even; NaN is 0.
#[inline(always)]
unsafe fn round<S: Simd>(x: &[f32], at: usize, inverse: f32, codes: &mut [i8; LANES]) {
    // SAFETY: slices.
    unsafe {
        let x = S::mul(load_part::<S>(x, at), S::splat(inverse));
        let above = S::max(x, S::splat(-127.0));
        let below = S::max(S::mul(above, S::splat(-1.0)), S::splat(-127.0));
        S::store_i8(codes.as_mut_ptr(), S::mul(below, S::splat(-1.0)));
    }
}

/// Up to sixteen floats to f16 bits, to nearest even; what f16 cannot hold becomes its largest number, so that masked
/// positions can be multiplied by zero. NaN stays NaN.
#[inline(always)]
unsafe fn narrow<S: Simd>(x: &[f32], out: &mut [u16; LANES]) {
    // SAFETY: sixteen of each.
    unsafe { S::store_f16(out.as_mut_ptr(), load_part::<S>(x, 0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [KvType; 2] = [KvType::F16, KvType::Int8];

    /// A cache of one page with one row `[k | v]` at slot 3.
    fn stored(kind: KvType, isa: Isa, row: &[f32]) -> KvLayer {
        let mut cache = KvLayer::new(kind, 1, 1, row.len() / 2);
        let span = Span {
            first_row: 0,
            rows: 1,
            first_page: 0,
            pages: 1,
            start: 3,
            long: false,
        };
        let pool = Pool::new(1);
        cache.store(isa, &pool, &[span], &[0], row, row.len(), 0);
        cache
    }

    fn read(cache: &KvLayer) -> (Vec<f32>, Vec<f32>) {
        let all = 0..cache.head_dim;
        let keys = all.clone().map(|d| cache.key(0, 0, 3, d)).collect();
        (keys, all.map(|d| cache.value(0, 0, 3, d)).collect())
    }

    #[test]
    fn numbers_come_back_as_near_as_their_type_allows() {
        let row: Vec<f32> = (0..2 * 37)
            .map(|i| ((i * 7919 % 1009) as f32 / 500.0 - 1.0) * 3.0)
            .collect();
        for kind in KINDS {
            for isa in Isa::available() {
                let cache = stored(kind, isa, &row);
                let (keys, values) = read(&cache);
                for (want, got) in [(&row[..37], keys), (&row[37..], values)] {
                    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
                    for (want, got) in want.iter().zip(got) {
                        let near = match kind {
                            KvType::F16 => want.abs() / 2048.0 + 1e-7,
                            KvType::Int8 => largest / 127.0 * 0.5001,
                        };
                        assert!((want - got).abs() <= near, "{kind:?}: {got} for {want}");
                    }
                }
                // The other slots are untouched, and all instruction sets write the same.
                let plain = stored(kind, Isa::SCALAR, &row);
                assert_eq!(cache.keys(0, 0), plain.keys(0, 0), "{}", isa.name());
                assert_eq!(cache.values(0, 0), plain.values(0, 0), "{}", isa.name());
                assert!((0..37).all(|d| cache.key(0, 0, 2, d) == 0.0));
            }
        }
    }

    #[test]
    fn what_f16_cannot_hold_is_its_largest_number() {
        let row = [
            1e9,
            f32::NEG_INFINITY,
            1.0,
            0.0,
            -65504.0,
            65519.0,
            65520.0,
            6e-8,
        ];
        for isa in Isa::available() {
            let (keys, values) = read(&stored(KvType::F16, isa, &row));
            assert_eq!(keys, [65504.0, -65504.0, 1.0, 0.0], "{}", isa.name());
            let least = 2f32.powi(-24);
            assert_eq!(
                values,
                [-65504.0, 65504.0, 65504.0, least],
                "{}",
                isa.name()
            );
            let (keys, values) = read(&stored(KvType::Int8, isa, &row));
            assert_eq!(keys, [65504.0, -65504.0, 0.0, 0.0], "{}", isa.name());
            assert_eq!(values, [-65504.0, 65504.0, 65504.0, 0.0], "{}", isa.name());
        }
    }

    #[test]
    fn a_nan_is_seen_in_its_key_and_never_multiplies_a_masked_weight() {
        let nan = f32::NAN;
        for kind in KINDS {
            for isa in Isa::available() {
                for row in [[nan, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, nan]] {
                    let (keys, values) = read(&stored(kind, isa, &row));
                    assert!(keys.iter().sum::<f32>().is_nan(), "{kind:?} {}", isa.name());
                    assert!(values.iter().all(|x| x.is_finite()), "{kind:?}");
                }
                let (keys, values) = read(&stored(kind, isa, &[0.0, -0.0, 1e-40, 0.0]));
                assert!(keys.iter().chain(&values).all(|x| x.abs() < 1e-30));
            }
        }
    }

    #[test]
    fn a_row_is_added_as_it_was_stored() {
        let row: Vec<f32> = (0..2 * 37).map(|i| i as f32 / 4.0 - 7.0).collect();
        for kind in KINDS {
            let cache = stored(kind, Isa::SCALAR, &row);
            let (keys, values) = read(&cache);
            let mut out = vec![1.0; 74];
            let by: Vec<f32> = (0..74).map(|i| (i % 3) as f32).collect();
            cache.add_row(0, 3, &by, &mut out);
            let want = keys
                .iter()
                .chain(&values)
                .zip(&by)
                .map(|(x, by)| 1.0 + by * x);
            assert_eq!(out, want.collect::<Vec<_>>());
        }
    }

    #[test]
    fn int8_pages_take_little_more_than_half_of_f16_ones() {
        for dim in [64, 128, 256] {
            let bytes = |kind| KvLayer::page_bytes(kind, 2, dim) as f64;
            let part = bytes(KvType::Int8) / bytes(KvType::F16);
            assert!((0.5..0.54).contains(&part), "{dim}: {part}");
        }
    }

    #[test]
    #[should_panic(expected = "beyond the cache")]
    fn a_page_beyond_the_cache_is_refused() {
        let mut cache = KvLayer::new(KvType::F16, 2, 1, 16);
        let span = Span {
            first_row: 0,
            rows: 1,
            first_page: 0,
            pages: 1,
            start: 0,
            long: false,
        };
        cache.store(
            Isa::SCALAR,
            &Pool::new(1),
            &[span],
            &[2],
            &[0.0; 48],
            48,
            16,
        );
    }
}

//! Weights in tiles times rows of activations. A row's bits do not depend on how many rows there are, nor on threads.

use std::ops::Range;

use crate::activations::{ActBlock, Activations, Scales};
#[cfg(target_arch = "x86_64")]
use crate::avx512::Avx512;
use crate::elementwise::{Activation, activate, gate, softcap};
use crate::pool::{Pool, SendPtr};
use crate::quant::TensorType;
#[cfg(target_arch = "x86_64")]
use crate::simd::Set;
use crate::simd::{Isa, LANES, Simd, dispatch, prefetch_line};
use crate::spread::many_rows;
use crate::tile::{self, BLOCK, Format, Tiles};

/// From so many rows on it pays to spread tiles out.
const MANY: usize = 32;

/// A weight matrix made of parts that share their inputs; their outputs lie side by side.
pub struct Matrix {
    pub parts: Vec<Tiles>,
    /// One per output, padded to whole tiles part by part.
    bias: Option<Vec<f32>>,
    inputs: usize,
    outputs: usize,
}

impl Matrix {
    /// # Panics
    /// When parts disagree on their inputs, or `bias` is not one per output.
    pub fn new(parts: Vec<Tiles>, bias: Option<&[f32]>) -> Self {
        let inputs = parts.first().map_or(0, Tiles::inputs);
        assert!(
            parts.iter().all(|p| p.inputs() == inputs),
            "parts share their inputs"
        );
        let outputs = parts.iter().map(Tiles::rows).sum();
        let bias = bias.map(|bias| {
            assert_eq!(bias.len(), outputs, "one bias per output");
            let mut padded = Vec::new();
            let mut rest = bias;
            for part in &parts {
                let (own, others) = rest.split_at(part.rows());
                padded.extend_from_slice(own);
                padded.resize(padded.len().next_multiple_of(LANES), 0.0);
                rest = others;
            }
            padded
        });
        Self {
            parts,
            bias,
            inputs,
            outputs,
        }
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }
    pub fn outputs(&self) -> usize {
        self.outputs
    }
    /// Tiles of all parts.
    pub fn tiles(&self) -> usize {
        self.parts.iter().map(Tiles::tiles).sum()
    }
    /// Whether a part needs activations quantised so.
    pub fn needs(&self, scales: Scales) -> bool {
        let mut parts = self.parts.iter();
        parts.any(|p| Scales::of(p.tensor_type()) == Some(scales))
    }
    /// Whether a part needs activations rounded to bf16.
    pub fn needs_pairs(&self) -> bool {
        self.has(&[TensorType::BF16])
    }
    fn has(&self, types: &[TensorType]) -> bool {
        let mut parts = self.parts.iter();
        parts.any(|p| types.contains(&p.tensor_type()))
    }
    /// How activations must be quantised, if in one way.
    pub fn scales(&self) -> Option<Scales> {
        match (self.needs(Scales::Block), self.needs(Scales::Super)) {
            (true, false) => Some(Scales::Block),
            (false, true) => Some(Scales::Super),
            _ => None,
        }
    }
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Tiles::bytes).sum()
    }
}

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Store {
    /// `out = product`
    Set,
    /// `out += product`
    Add,
    /// `out = activation(out) * product`
    Gate(Activation),
    /// `out = activation(product)`
    Activate(Activation),
    /// `out = cap * tanh(product / cap)`
    Softcap(f32),
}

/// `out[row] = matrix * x[row] + bias`, `[rows][outputs]`; or that added to what is there.
///
/// # Panics
/// When the lengths do not agree.
pub fn matmul(
    isa: Isa,
    pool: &Pool,
    matrix: &Matrix,
    x: Activations,
    store: Store,
    out: &mut [f32],
) {
    check(matrix, &x, matrix.outputs, out);
    let tiles = matrix.tiles();
    let per_unit = per_unit(pool, tiles);
    let base = SendPtr(out.as_mut_ptr());
    pool.run(tiles.div_ceil(per_unit), |unit| {
        let range = unit * per_unit..tiles.min((unit + 1) * per_unit);
        // SAFETY: lengths were checked, `isa` was detected, and each tile is one unit's.
        unsafe { run_range(isa, matrix, x, store, base.get(), range) };
    });
}

/// What [`matmul`] gives for the tiles `chosen`, ascending, counted part by part; minus infinity for the other outputs.
///
/// # Panics
/// When the lengths do not agree, the tiles do not ascend, or the matrix does not have them.
pub fn matmul_chosen(
    isa: Isa,
    pool: &Pool,
    matrix: &Matrix,
    x: Activations,
    store: Store,
    chosen: &[u32],
    out: &mut [f32],
) {
    check(matrix, &x, matrix.outputs, out);
    let tiles = matrix.tiles();
    assert!(
        chosen.is_sorted_by(|a, b| a < b) && chosen.last().is_none_or(|t| (*t as usize) < tiles),
        "chosen tiles ascend, below {tiles}"
    );
    out.fill(f32::NEG_INFINITY);
    let per_unit = per_unit(pool, chosen.len());
    let base = SendPtr(out.as_mut_ptr());
    pool.run(chosen.len().div_ceil(per_unit), |unit| {
        let mine = &chosen[unit * per_unit..chosen.len().min((unit + 1) * per_unit)];
        for neighbours in mine.chunk_by(|a, b| a + 1 == *b) {
            let first = neighbours[0] as usize;
            let range = first..first + neighbours.len();
            // SAFETY: lengths were checked, `isa` was detected, and each tile is one unit's.
            unsafe { run_range(isa, matrix, x, store, base.get(), range) };
        }
    });
}

/// Some tiles, counted part by part, times all rows.
///
/// # Safety
/// `isa` was detected, `out` is `[rows][outputs]`, and nobody else touches what these tiles give.
unsafe fn run_range(
    isa: Isa,
    matrix: &Matrix,
    x: Activations,
    store: Store,
    out: *mut f32,
    range: Range<usize>,
) {
    let mut column = 0;
    let mut before = 0;
    for part in &matrix.parts {
        let first = range.start.max(before);
        let last = range.end.min(before + part.tiles());
        if first < last {
            let i = first - before;
            let task = Task {
                tiles: part,
                first: i,
                count: last - first,
                inputs: matrix.inputs,
                x,
                bias: matrix
                    .bias
                    .as_ref()
                    .map(|b| &b[first * LANES..last * LANES]),
                store,
                // SAFETY: a tile's columns are inside its row of `out`.
                out: unsafe { out.add(column + i * LANES) },
                stride: matrix.outputs,
            };
            // SAFETY: as above; the rest is the caller's.
            unsafe { run_tiles(isa, part.tensor_type(), &task) };
        }
        before += part.tiles();
        column += part.rows();
    }
}

/// `out[row] = activation(gate * x[row]) * (up * x[row])` of a matrix with the parts gate and up, `[rows][outputs / 2]`.
///
/// # Panics
/// When there are not two parts of the same size, or the lengths do not agree.
pub fn gated(
    isa: Isa,
    pool: &Pool,
    matrix: &Matrix,
    activation: Activation,
    x: Activations,
    out: &mut [f32],
) {
    let [gate, up] = &matrix.parts[..] else {
        panic!("gate and up, got {} parts", matrix.parts.len());
    };
    assert_eq!(gate.rows(), up.rows(), "outputs of gate and up");
    let width = gate.rows();
    check(matrix, &x, width, out);
    let per_unit = per_unit(pool, gate.tiles());
    let base = SendPtr(out.as_mut_ptr());
    pool.run(gate.tiles().div_ceil(per_unit), |unit| {
        let first = unit * per_unit;
        let count = per_unit.min(gate.tiles() - first);
        // A unit's gates are still at hand when its ups are there.
        for (part, before, store) in [
            (gate, 0, Store::Set),
            (up, gate.tiles(), Store::Gate(activation)),
        ] {
            let task = Task {
                tiles: part,
                first,
                count,
                inputs: matrix.inputs,
                x,
                bias: matrix
                    .bias
                    .as_ref()
                    .map(|b| &b[(before + first) * LANES..][..count * LANES]),
                store,
                // SAFETY: a tile's columns are inside its row of `out`, and each tile is one unit's.
                out: unsafe { base.get().add(first * LANES) },
                stride: width,
            };
            // SAFETY: as above; lengths were checked at the top.
            unsafe { run_tiles(isa, part.tensor_type(), &task) };
        }
    });
}

/// Tiles of a unit: enough units that a slow thread does not hold up the others, few enough that taking one costs nothing.
/// Even, because many rows go over two tiles at a time.
fn per_unit(pool: &Pool, tiles: usize) -> usize {
    let fair = tiles.div_ceil(pool.threads() * 16).max(1);
    match fair {
        1 => 1,
        _ => fair.next_multiple_of(2),
    }
}

/// # Panics
/// When the lengths do not agree.
fn check(matrix: &Matrix, x: &Activations, width: usize, out: &[f32]) {
    assert_eq!(out.len(), x.rows * width, "{} rows of {width}", x.rows);
    for (scales, blocks) in [(Scales::Block, x.blocks), (Scales::Super, x.supers)] {
        if matrix.needs(scales) {
            assert_eq!(
                blocks.len() * BLOCK,
                x.rows * matrix.inputs,
                "quantised activations"
            );
        }
    }
    if matrix.has(&[TensorType::F32, TensorType::F16]) {
        assert_eq!(x.floats.len(), x.rows * matrix.inputs, "float activations");
    }
    if matrix.needs_pairs() {
        let pairs = matrix.inputs.div_ceil(2);
        assert_eq!(x.pairs.len(), x.rows * pairs, "bf16 activations");
    }
}

/// Some tiles of one part times all rows.
pub(crate) struct Task<'a> {
    pub tiles: &'a Tiles,
    pub first: usize,
    pub count: usize,
    pub inputs: usize,
    pub x: Activations<'a>,
    bias: Option<&'a [f32]>,
    store: Store,
    /// The first tile's outputs of the first row; those of the next row are `stride` further.
    pub out: *mut f32,
    pub stride: usize,
}

impl Task<'_> {
    /// Outputs of its `tile`-th tile that exist.
    pub fn width(&self, tile: usize) -> usize {
        LANES.min(self.tiles.rows() - (self.first + tile) * LANES)
    }
    pub fn bias(&self, tile: usize) -> Option<&[f32]> {
        self.bias.map(|bias| &bias[tile * LANES..][..LANES])
    }
}

unsafe fn run_tiles(isa: Isa, tensor_type: TensorType, task: &Task) {
    use TensorType as T;
    unsafe {
        match tensor_type {
            T::F32 => float_tiles::<F32>(isa, task),
            T::F16 => float_tiles::<F16>(isa, task),
            T::BF16 => bf16_tiles(isa, task),
            T::Q4_0 => quantised::<tile::Q4_0>(isa, task),
            T::Q4_1 => quantised::<tile::Q4_1>(isa, task),
            T::Q5_0 => quantised::<tile::Q5_0>(isa, task),
            T::Q5_1 => quantised::<tile::Q5_1>(isa, task),
            T::Q8_0 => quantised::<tile::Q8_0>(isa, task),
            T::Q2_K => quantised::<tile::Q2K>(isa, task),
            T::Q3_K => quantised::<tile::Q3K>(isa, task),
            T::Q4_K => quantised::<tile::Q4K>(isa, task),
            T::Q5_K => quantised::<tile::Q5K>(isa, task),
            T::Q6_K => quantised::<tile::Q6K>(isa, task),
            T::IQ4_NL => quantised::<tile::Iq4Nl>(isa, task),
            T::IQ4_XS => quantised::<tile::Iq4Xs>(isa, task),
            T::MXFP4 => quantised::<tile::Mxfp4>(isa, task),
            T::NF4 => quantised::<tile::Nf4>(isa, task),
            T::FP4 => quantised::<tile::Fp4>(isa, task),
        }
    }
}

/// Two functions, because few rows would pay for the stack that many rows take.
unsafe fn quantised<F: Format>(isa: Isa, task: &Task) {
    unsafe {
        match task.x.rows >= MANY {
            true => quant_many::<F>(isa, task),
            false => quant_few::<F>(isa, task),
        }
    }
}

dispatch! {
    unsafe fn quant_many<F: Format>(task: &Task) = many_rows
}
dispatch! {
    unsafe fn quant_few<F: Format>(task: &Task) = few_rows
}
dispatch! {
    unsafe fn float_tiles<W: FloatType>(task: &Task) = float_body
}

unsafe fn bf16_tiles(isa: Isa, task: &Task) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(
            enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
        )]
        unsafe fn native(task: &Task) {
            unsafe { float_body::<Avx512, Bf16<true>>(task) }
        }
        if isa.0 == Set::Avx512Bf16 {
            // SAFETY: the features were detected.
            return unsafe { native(task) };
        }
    }
    unsafe { float_tiles::<Bf16<false>>(isa, task) }
}

/// `for i in 0..M`, written out: a loop that the compiler keeps puts its sums on the stack. `M` is at most 8, or what is
/// said: the fewer, the less there is to compile.
macro_rules! each_row {
    ($m:expr, $i:ident, $body:block) => {
        each_row!(@ $m, $i, $body, 0 1 2 3 4 5 6 7)
    };
    ($m:expr, at most 2, $i:ident, $body:block) => {
        each_row!(@ $m, $i, $body, 0 1)
    };
    ($m:expr, at most 12, $i:ident, $body:block) => {
        each_row!(@ $m, $i, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $m:expr, $i:ident, $body:block, $($n:literal)*) => {
        $(if $m > $n {
            let $i = $n;
            $body
        })*
    };
}
pub(crate) use each_row;

/// All rows in groups of at most `S::ROWS`, 8, 4, 2 and 1: the group's size is a compile-time constant, which doubles the rate.
#[inline(always)]
unsafe fn few_rows<S: Simd, F: Format>(task: &Task) {
    unsafe {
        for tile in 0..task.count {
            let mut row = 0;
            if const { S::ROWS >= 8 } {
                while task.x.rows - row >= 8 {
                    quant_rows::<S, F, 8>(task, tile, row);
                    row += 8;
                }
            }
            if const { S::ROWS >= 4 } {
                while task.x.rows - row >= 4 {
                    quant_rows::<S, F, 4>(task, tile, row);
                    row += 4;
                }
            }
            if const { S::ROWS >= 2 } {
                while task.x.rows - row >= 2 {
                    quant_rows::<S, F, 2>(task, tile, row);
                    row += 2;
                }
            }
            while task.x.rows - row >= 1 {
                quant_rows::<S, F, 1>(task, tile, row);
                row += 1;
            }
        }
    }
}

/// How far ahead, in bytes, weights are fetched where several rows share them: the CPU's own prefetching, which suffices
/// for one row, does not go far enough.
const AHEAD: usize = 8192;

#[inline(always)]
unsafe fn quant_rows<S: Simd, F: Format, const M: usize>(task: &Task, tile: usize, row: usize) {
    unsafe {
        let blocks = task.inputs / BLOCK;
        let acts = match F::ACTIVATIONS {
            Scales::Block => task.x.blocks,
            Scales::Super => task.x.supers,
        };
        let acts = acts.as_ptr().add(row * blocks);
        let mut total = [S::splat(0.0); M];
        let mut p = task.tiles.tile(task.first + tile).as_ptr();
        let mut block = 0;
        while block < blocks {
            let head = F::head::<S>(p);
            p = p.add(F::HEAD);
            if const { matches!(F::ACTIVATIONS, Scales::Block) } {
                for _ in 0..F::SUPER {
                    let Unpacked { w, s, o } = unpack::<S, F>(p, head);
                    each_row!(M, i, {
                        let x = &*acts.add(i * blocks + block);
                        let dots = S::sums_shift(dots::<S, F, 0, 8>(&w, x), x.shift);
                        total[i] = S::fma(S::to_f32(dots), s[0], total[i]);
                        if F::ZERO.is_none() {
                            total[i] = S::fma(o[0], S::splat(x.sum), total[i]);
                        }
                    });
                    p = p.add(F::CODES + F::SCALES);
                    block += 1;
                }
                continue;
            }
            // The blocks of a super-block have one scale of activations: it multiplies their sum.
            let mut sum = [S::splat(0.0); M];
            for _ in 0..F::SUPER {
                let Unpacked { w, s, o } = unpack::<S, F>(p, head);
                each_row!(M, i, {
                    let x = &*acts.add(i * blocks + block);
                    if F::HALVES {
                        sum[i] = S::fma(S::to_f32(dots::<S, F, 0, 4>(&w, x)), s[0], sum[i]);
                        if F::ZERO.is_none() {
                            let negated = S::to_f32(S::sums_splat(x.negated_sums[0]));
                            sum[i] = S::fma(o[0], negated, sum[i]);
                        }
                        sum[i] = S::fma(S::to_f32(dots::<S, F, 4, 8>(&w, x)), s[1], sum[i]);
                        if F::ZERO.is_none() {
                            let negated = S::to_f32(S::sums_splat(x.negated_sums[1]));
                            sum[i] = S::fma(o[1], negated, sum[i]);
                        }
                    } else {
                        sum[i] = S::fma(S::to_f32(dots::<S, F, 0, 8>(&w, x)), s[0], sum[i]);
                        if F::ZERO.is_none() {
                            sum[i] = S::fma(o[0], S::splat(x.sum), sum[i]);
                        }
                    }
                });
                p = p.add(F::CODES + F::SCALES);
                block += 1;
            }
            each_row!(M, i, {
                let scale = (*acts.add(i * blocks + block - 1)).scale;
                total[i] = S::fma(sum[i], S::splat(scale), total[i]);
            });
        }
        each_row!(M, i, {
            total[i] = scaled::<S, F>(task, tile, &*acts.add(i * blocks), total[i]);
        });
        finish::<S, M>(task, tile, row, total);
    }
}

/// The sum of a whole row, scaled where its blocks share the row's scale, and the bias.
#[inline(always)]
pub(crate) unsafe fn scaled<S: Simd, F: Format>(
    task: &Task,
    tile: usize,
    x: &ActBlock,
    total: S::F,
) -> S::F {
    unsafe {
        let bias = start::<S>(task.bias(tile));
        match F::ACTIVATIONS {
            Scales::Block => S::fma(total, S::splat(x.scale * F::UNIT), bias),
            Scales::Super => S::add(total, bias),
        }
    }
}

/// A block's codes, and the scales and offsets of its halves, or of all of it twice.
struct Unpacked<S: Simd> {
    w: [S::I; 8],
    s: [S::F; 2],
    o: [S::F; 2],
}

/// The block at `p`; what comes later is fetched.
#[inline(always)]
unsafe fn unpack<S: Simd, F: Format>(p: *const u8, head: [S::F; 2]) -> Unpacked<S> {
    unsafe {
        for line in 0..(F::CODES + F::SCALES).div_ceil(64) {
            prefetch_line(p.wrapping_add(AHEAD + 64 * line));
        }
        let scales = p.add(F::CODES);
        let (s0, o0) = F::scale::<S>(scales, head, 0);
        let (s1, o1) = match F::HALVES {
            true => F::scale::<S>(scales, head, 1),
            false => (s0, o0),
        };
        Unpacked {
            w: F::steps::<S>(p),
            s: [s0, s1],
            o: [o0, o1],
        }
    }
}

/// What the integer dots of steps `FROM..TO` begin with: minus the zero point times the codes' sum.
#[inline(always)]
pub(crate) unsafe fn first_sum<S: Simd, F: Format, const FROM: usize, const TO: usize>(
    x: &ActBlock,
) -> S::S {
    unsafe {
        let Some(zero) = F::ZERO else {
            return S::sums_zero();
        };
        const { assert!(F::SMALL || matches!(F::ZERO, Some(7))) };
        if S::CENTRED && !F::SMALL {
            // `dot4` takes it off each code.
            return S::sums_zero();
        }
        let [first, second] = x.negated_sums;
        let negated = match (FROM, TO) {
            (0, 4) => S::sums_splat(first),
            (4, 8) => S::sums_splat(second),
            _ => S::sums_add(S::sums_splat(first), S::sums_splat(second)),
        };
        S::sums_shl(negated, zero)
    }
}

/// The integer dots of steps `FROM..TO` of a block, its zero point taken off.
#[inline(always)]
unsafe fn dots<S: Simd, F: Format, const FROM: usize, const TO: usize>(
    w: &[S::I; 8],
    x: &ActBlock,
) -> S::S {
    unsafe {
        let mut sum = first_sum::<S, F, FROM, TO>(x);
        each_row!(TO, s, {
            if s >= FROM {
                let x = x.codes.as_ptr().add(4 * s);
                sum = match F::SMALL {
                    true => S::dot4::<true>(sum, w[s & 7], x),
                    false => S::dot4::<false>(sum, w[s & 7], x),
                };
            }
        });
        sum
    }
}

#[inline(always)]
pub(crate) unsafe fn start<S: Simd>(bias: Option<&[f32]>) -> S::F {
    unsafe {
        match bias {
            Some(bias) => S::load_f32(bias.as_ptr()),
            None => S::splat(0.0),
        }
    }
}

/// What a tile's outputs of a row become.
#[inline(always)]
pub(crate) unsafe fn store_out<S: Simd>(task: &Task, tile: usize, out: *mut f32, total: S::F) {
    unsafe {
        let width = task.width(tile);
        let mut part = [0f32; LANES];
        let to = match width {
            LANES => out,
            _ => part.as_mut_ptr(),
        };
        if width < LANES && matches!(task.store, Store::Add | Store::Gate(_)) {
            std::ptr::copy_nonoverlapping(out, to, width);
        }
        let total = match task.store {
            Store::Set => total,
            Store::Add => S::add(S::load_f32(to), total),
            Store::Gate(activation) => gate::<S>(activation, S::load_f32(to), total),
            Store::Activate(activation) => activate::<S>(activation, total),
            Store::Softcap(cap) => softcap::<S>(cap, total),
        };
        S::store(to, total);
        if width < LANES {
            std::ptr::copy_nonoverlapping(to, out, width);
        }
    }
}

#[inline(always)]
unsafe fn finish<S: Simd, const M: usize>(task: &Task, tile: usize, row: usize, total: [S::F; M]) {
    unsafe {
        for (i, total) in total.into_iter().enumerate() {
            let out = task.out.add((row + i) * task.stride + tile * LANES);
            store_out::<S>(task, tile, out, total);
        }
    }
}

/// How a float type is multiplied, 4 bytes of a row of activations at a time: a float, or a pair of bf16.
trait FloatType {
    /// Inputs that one step takes, and bytes of their 16 weights.
    const INPUTS: usize;
    const BYTES: usize;
    type Weights<S: Simd>: Copy;
    /// The first row.
    fn rows(x: &Activations) -> *const f32;
    unsafe fn load<S: Simd>(p: *const u8) -> Self::Weights<S>;
    /// `sum` + `w` times what is at `x`.
    unsafe fn fma<S: Simd>(w: Self::Weights<S>, x: *const f32, sum: S::F) -> S::F;
}

macro_rules! float_type {
    ($name:ident, $bytes:expr, $load:ident) => {
        struct $name;
        impl FloatType for $name {
            const INPUTS: usize = 1;
            const BYTES: usize = $bytes * LANES;
            type Weights<S: Simd> = S::F;
            fn rows(x: &Activations) -> *const f32 {
                x.floats.as_ptr()
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(p: *const u8) -> S::F {
                unsafe { S::$load(p.cast()) }
            }
            #[inline(always)]
            unsafe fn fma<S: Simd>(w: S::F, x: *const f32, sum: S::F) -> S::F {
                unsafe { S::fma(w, S::splat(*x), sum) }
            }
        }
    };
}
float_type!(F32, 4, load_f32);
float_type!(F16, 2, load_f16);

/// `NATIVE`: by the CPU's own instruction.
struct Bf16<const NATIVE: bool>;
impl<const NATIVE: bool> FloatType for Bf16<NATIVE> {
    const INPUTS: usize = 2;
    const BYTES: usize = 4 * LANES;
    type Weights<S: Simd> = S::I;
    fn rows(x: &Activations) -> *const f32 {
        x.pairs.as_ptr().cast()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::I {
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn fma<S: Simd>(w: S::I, x: *const f32, sum: S::F) -> S::F {
        unsafe { S::dot_bf16::<NATIVE>(sum, w, x.cast()) }
    }
}

#[inline(always)]
unsafe fn float_body<S: Simd, W: FloatType>(task: &Task) {
    unsafe {
        let mut tile = 0;
        if const { S::MANY_TILES >= 2 } {
            while task.count - tile >= 2 {
                float_groups::<S, W, 2>(task, tile);
                tile += 2;
            }
        }
        while tile < task.count {
            float_groups::<S, W, 1>(task, tile);
            tile += 1;
        }
    }
}

/// All rows times `T` tiles.
#[inline(always)]
unsafe fn float_groups<S: Simd, W: FloatType, const T: usize>(task: &Task, tile: usize) {
    unsafe {
        let mut row = 0;
        while row < task.x.rows {
            let rest = task.x.rows - row;
            if const { T == 2 } && rest >= 8 {
                float_rows::<S, W, 12, T>(task, tile, row);
                row += 12;
            } else if const { S::ROWS >= 4 } && rest >= 2 {
                float_rows::<S, W, 4, T>(task, tile, row);
                row += 4;
            } else {
                float_rows::<S, W, 1, T>(task, tile, row);
                row += 1;
            }
        }
    }
}

/// `M` rows from `row` on times `T` tiles; rows beyond the last are the last again, and not stored.
#[inline(always)]
unsafe fn float_rows<S: Simd, W: FloatType, const M: usize, const T: usize>(
    task: &Task,
    tile: usize,
    row: usize,
) {
    unsafe {
        let last = task.x.rows - 1;
        let steps = task.inputs.div_ceil(W::INPUTS);
        let mut x = [std::ptr::null::<f32>(); M];
        let mut total = [[S::splat(0.0); T]; M];
        each_row!(M, at most 12, i, {
            x[i] = W::rows(&task.x).add((row + i).min(last) * steps);
            each_row!(T, at most 2, t, {
                total[i][t] = start::<S>(task.bias(tile + t));
            });
        });
        let mut p = [std::ptr::null::<u8>(); T];
        for (t, p) in p.iter_mut().enumerate() {
            *p = task.tiles.tile(task.first + tile + t).as_ptr();
        }
        for k in 0..steps {
            if const { M < 12 } {
                each_row!(T, at most 2, t, {
                    prefetch_line(p[t].wrapping_add(k * W::BYTES + AHEAD));
                });
            }
            let mut w = [W::load::<S>(p[0].add(k * W::BYTES)); T];
            if const { T == 2 } {
                w[1] = W::load::<S>(p[1].add(k * W::BYTES));
            }
            each_row!(M, at most 12, i, {
                each_row!(T, at most 2, t, {
                    total[i][t] = W::fma::<S>(w[t], x[i].add(k), total[i][t]);
                });
            });
        }
        each_row!(M, at most 12, i, {
            if row + i <= last {
                for (t, total) in total[i].into_iter().enumerate() {
                    let out = task.out.add((row + i) * task.stride + (tile + t) * LANES);
                    store_out::<S>(task, tile + t, out, total);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activations::{quantize_rows, round_rows};
    use crate::quant::{FP4_VALUES, NF4_VALUES, dequantize};

    /// A small deterministic generator; tests need no crate for it.
    struct Random(u64);
    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self
                .0
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            self.0 >> 33
        }
        fn float(&mut self) -> f32 {
            self.next() as f32 / (1u64 << 31) as f32 * 2.0 - 1.0
        }
    }

    /// Random blocks whose scales are ordinary numbers.
    fn random_blocks(t: TensorType, rows: usize, inputs: usize, r: &mut Random) -> Vec<u8> {
        use TensorType as T;
        let count = rows * inputs / t.block_len();
        let mut out = Vec::new();
        for _ in 0..count {
            let mut block: Vec<u8> = (0..t.block_bytes()).map(|_| r.next() as u8).collect();
            let mut half = |at: usize| {
                let bits = half::f16::from_f32(r.float() * 0.1).to_le_bytes();
                block[at..at + 2].copy_from_slice(&bits);
            };
            match t {
                T::F32 => block.copy_from_slice(&r.float().to_le_bytes()),
                T::BF16 => block.copy_from_slice(&half::bf16::from_f32(r.float()).to_le_bytes()),
                T::F16 => half(0),
                T::Q4_0 | T::Q5_0 | T::Q8_0 | T::IQ4_NL | T::IQ4_XS => half(0),
                T::Q4_1 | T::Q5_1 | T::Q4_K | T::Q5_K => {
                    half(0);
                    half(2);
                }
                T::Q2_K => {
                    half(80);
                    half(82);
                }
                T::Q3_K => half(108),
                T::Q6_K => half(208),
                T::MXFP4 => block[0] = 118 + (r.next() % 8) as u8,
                T::NF4 | T::FP4 => {
                    // What f16 can hold.
                    let most = half::f16::from_f32(r.float().abs() * 0.1).to_f32();
                    block[..4].copy_from_slice(&most.to_le_bytes());
                }
            }
            out.extend(block);
        }
        out
    }

    /// Floats, the same in bf16, and quantised in blocks and in super-blocks where the width allows it.
    struct Owned {
        rows: usize,
        floats: Vec<f32>,
        pairs: Vec<[u16; 2]>,
        blocks: [Vec<ActBlock>; 2],
    }
    impl Owned {
        fn all(&self) -> Activations<'_> {
            self.some(0, self.rows)
        }
        fn some(&self, first: usize, rows: usize) -> Activations<'_> {
            fn part<T>(all: &[T], of: usize, first: usize, rows: usize) -> &[T] {
                let each = all.len() / of;
                &all[first * each..][..rows * each]
            }
            Activations {
                rows,
                floats: part(&self.floats, self.rows, first, rows),
                pairs: part(&self.pairs, self.rows, first, rows),
                blocks: part(&self.blocks[0], self.rows, first, rows),
                supers: part(&self.blocks[1], self.rows, first, rows),
            }
        }
    }

    fn activations(rows: usize, inputs: usize, r: &mut Random) -> Owned {
        let x: Vec<f32> = (0..rows * inputs).map(|_| r.float() * 3.0).collect();
        let blocks = [Scales::Block, Scales::Super].map(|scales| {
            let mut blocks = vec![ActBlock::default(); x.len() / BLOCK];
            if inputs.is_multiple_of(BLOCK * scales.blocks()) {
                quantize_rows(Isa::SCALAR, &Pool::new(1), &x, inputs, scales, &mut blocks);
            }
            blocks
        });
        let mut pairs = vec![[0; 2]; rows * inputs.div_ceil(2)];
        round_rows(Isa::SCALAR, &Pool::new(1), &x, inputs, &mut pairs);
        Owned {
            rows,
            floats: x,
            pairs,
            blocks,
        }
    }

    /// The numbers as tiles hold them: of NF4 and FP4 whole steps of the largest.
    fn resident(t: TensorType, data: &[u8], count: usize) -> Vec<f32> {
        let mut weights = vec![0f32; count];
        dequantize(t, data, &mut weights);
        let (values, whole, steps) = match t {
            TensorType::NF4 => (NF4_VALUES, tile::NF4_WHOLE, tile::NF4_STEPS),
            TensorType::FP4 => (FP4_VALUES, tile::FP4_WHOLE, tile::FP4_STEPS),
            _ => return weights,
        };
        for (block, x) in data.chunks(36).zip(weights.chunks_mut(64)) {
            let most = f32::from_le_bytes(block[..4].try_into().unwrap());
            for x in x {
                let code = values.iter().position(|v| v * most == *x).unwrap();
                let near = f32::from(whole[code]) / steps * most;
                assert!(
                    (near - *x).abs() <= 0.51 / steps * most,
                    "{t:?}: {near} for {x}"
                );
                *x = near;
            }
        }
        weights
    }

    /// The definition: dequantised weights times dequantised activations, in f64.
    fn oracle(t: TensorType, data: &[u8], rows: usize, inputs: usize, x: &Owned) -> Vec<f64> {
        let blocks = &x.blocks[usize::from(Scales::of(t) == Some(Scales::Super))];
        let weights = resident(t, data, rows * inputs);
        let x: Vec<f64> = match t {
            TensorType::F32 | TensorType::F16 => x.floats.iter().map(|&x| f64::from(x)).collect(),
            TensorType::BF16 => (x.floats.iter())
                .map(|&x| half::bf16::from_f32(x).to_f64())
                .collect(),
            _ => blocks
                .iter()
                .flat_map(|b| {
                    b.codes
                        .map(|c| f64::from(c) * f64::from(b.scale) * f64::from(1 << b.shift))
                })
                .collect(),
        };
        let dot =
            |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum::<f64>();
        x.chunks(inputs)
            .flat_map(|x| weights.chunks(inputs).map(move |w| dot(x, w)))
            .collect()
    }

    #[test]
    fn every_type_on_every_path_is_the_dequantised_product() {
        let r = &mut Random(1);
        let pool = Pool::new(2);
        for t in TensorType::ALL {
            let (outputs, inputs, rows) = (37, 3072, 39);
            let data = random_blocks(t, outputs, inputs, r);
            let x = activations(rows, inputs, r);
            let want = oracle(t, &data, outputs, inputs, &x);
            let matrix = Matrix::new(vec![Tiles::pack(t, outputs, inputs, &data, &pool)], None);
            let x = x.all();
            let size = want.iter().fold(0f64, |a, b| a.max(b.abs()));
            let mut scalar = vec![0.0; want.len()];
            matmul(Isa::SCALAR, &pool, &matrix, x, Store::Set, &mut scalar);
            for (got, want) in scalar.iter().zip(&want) {
                assert!(
                    (f64::from(*got) - want).abs() < 1e-5 * size,
                    "{t:?}: {got} for {want}"
                );
            }
            for isa in Isa::available() {
                let mut fast = vec![0.0; want.len()];
                matmul(isa, &pool, &matrix, x, Store::Set, &mut fast);
                assert_eq!(fast, scalar, "{t:?} on {}", isa.name());
            }
        }
    }

    #[test]
    fn widths_of_any_number_of_inputs_are_multiplied() {
        let r = &mut Random(6);
        let pool = Pool::new(2);
        for t in [TensorType::F32, TensorType::F16, TensorType::BF16] {
            for (inputs, rows) in [(1, 1), (2, 3), (15, 9), (17, 5), (33, 26), (64, 12)] {
                let outputs = 50;
                let data = random_blocks(t, outputs, inputs, r);
                let matrix = Matrix::new(vec![Tiles::pack(t, outputs, inputs, &data, &pool)], None);
                let x = activations(rows, inputs, r);
                let want = oracle(t, &data, outputs, inputs, &x);
                for isa in Isa::available() {
                    let mut out = vec![0.0; want.len()];
                    matmul(isa, &pool, &matrix, x.all(), Store::Set, &mut out);
                    for (got, want) in out.iter().zip(&want) {
                        let error = (f64::from(*got) - want).abs();
                        assert!(error < 1e-5, "{t:?} {inputs}: {got} for {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_company() {
        let r = &mut Random(2);
        let pool = Pool::new(2);
        use TensorType as T;
        for t in [T::Q4_1, T::Q6_K, T::F16, T::BF16] {
            let (outputs, inputs, rows) = (64, 256, 39);
            let data = random_blocks(t, outputs, inputs, r);
            let matrix = Matrix::new(vec![Tiles::pack(t, outputs, inputs, &data, &pool)], None);
            let x = activations(rows, inputs, r);
            let mut together = vec![0.0; rows * outputs];
            let isa = Isa::detect();
            matmul(isa, &pool, &matrix, x.all(), Store::Set, &mut together);
            for row in 0..rows {
                let mut alone = vec![0.0; outputs];
                matmul(isa, &pool, &matrix, x.some(row, 1), Store::Set, &mut alone);
                assert_eq!(
                    alone,
                    together[row * outputs..][..outputs],
                    "{t:?} row {row}"
                );
            }
        }
    }

    #[test]
    fn parts_lie_side_by_side_and_bias_is_added() {
        let r = &mut Random(3);
        let pool = Pool::new(2);
        let (inputs, rows) = (64, 3);
        let parts: Vec<_> = [
            (TensorType::Q4_0, 20),
            (TensorType::F32, 16),
            (TensorType::Q8_0, 5),
            (TensorType::BF16, 9),
        ]
        .map(|(t, n)| (t, n, random_blocks(t, n, inputs, r)))
        .into();
        let bias: Vec<f32> = (0..50).map(|i| i as f32).collect();
        let tiles = parts
            .iter()
            .map(|(t, n, d)| Tiles::pack(*t, *n, inputs, d, &pool))
            .collect();
        let x = activations(rows, inputs, r);
        let acts = x.all();
        let mut all = vec![0.0; rows * 50];
        matmul(
            Isa::detect(),
            &pool,
            &Matrix::new(tiles, Some(&bias)),
            acts,
            Store::Set,
            &mut all,
        );
        let mut column = 0;
        for (t, n, data) in &parts {
            let want = oracle(*t, data, *n, inputs, &x);
            for row in 0..rows {
                for i in 0..*n {
                    let (got, want) = (
                        all[row * 50 + column + i],
                        want[row * n + i] + f64::from(bias[column + i]),
                    );
                    assert!(
                        (f64::from(got) - want).abs() < 1e-3,
                        "{t:?} row {row} output {i}: {got} for {want}"
                    );
                }
            }
            column += n;
        }
    }

    #[test]
    fn products_are_added_and_gated_as_they_are_stored() {
        let r = &mut Random(5);
        let pool = Pool::new(2);
        // Gate and up of different types; widths that are not whole tiles; more inputs than a segment has.
        let (inputs, outputs) = (2560, 53);
        let types = [TensorType::Q4_K, TensorType::Q6_K];
        let data = types.map(|t| random_blocks(t, outputs, inputs, r));
        let pack = |i: usize| Tiles::pack(types[i], outputs, inputs, &data[i], &pool);
        let bias: Vec<f32> = (0..2 * outputs).map(|_| r.float()).collect();
        let both = Matrix::new(vec![pack(0), pack(1)], Some(&bias));
        let alone =
            [0, 1].map(|i| Matrix::new(vec![pack(i)], Some(&bias[i * outputs..][..outputs])));
        for rows in [1, 7, 40] {
            let x = activations(rows, inputs, r);
            let x = x.all();
            let mut want = vec![0.0; rows * outputs];
            let mut up = want.clone();
            let isa = Isa::SCALAR;
            matmul(isa, &pool, &alone[0], x, Store::Set, &mut want);
            matmul(isa, &pool, &alone[1], x, Store::Set, &mut up);
            let sum: Vec<f32> = want.iter().zip(&up).map(|(g, u)| g + u).collect();
            for isa in Isa::available() {
                let mut added = want.clone();
                matmul(isa, &pool, &alone[1], x, Store::Add, &mut added);
                assert_eq!(added, sum, "{} of {rows} rows", isa.name());
            }
            let cap = 3.0f32;
            let mut first = None;
            for isa in Isa::available() {
                let mut capped = vec![0.0; rows * outputs];
                matmul(isa, &pool, &alone[1], x, Store::Softcap(cap), &mut capped);
                for (got, u) in capped.iter().zip(&up) {
                    let want = f64::from(cap) * (f64::from(*u) / f64::from(cap)).tanh();
                    let error = (f64::from(*got) - want).abs();
                    assert!(error < 1e-6 * f64::from(cap), "{u}: {got} for {want}");
                }
                assert_eq!(
                    first.get_or_insert(capped.clone()),
                    &capped,
                    "{}",
                    isa.name()
                );
            }
            let relu = Activation::Relu;
            for isa in Isa::available() {
                let mut out = vec![0.0; rows * outputs];
                matmul(isa, &pool, &alone[1], x, Store::Activate(relu), &mut out);
                assert!(out.iter().zip(&up).all(|(got, up)| *got == up.max(0.0)));
            }
            for activation in [Activation::Silu, Activation::GeluTanh, relu] {
                let mut first = None;
                for isa in Isa::available() {
                    let mut out = vec![0.0; rows * outputs];
                    gated(isa, &pool, &both, activation, x, &mut out);
                    for ((got, g), u) in out.iter().zip(&want).zip(&up) {
                        let (g, u) = (f64::from(*g), f64::from(*u));
                        let gate = match activation {
                            Activation::Silu => 1.0 / (1.0 + (-g).exp()),
                            Activation::GeluTanh => {
                                let t = 0.7978845608028654 * (g + 0.044715 * g.powi(3));
                                0.5 * (1.0 + t.tanh())
                            }
                            _ => f64::from(u8::from(g > 0.0)),
                        };
                        let error = (f64::from(*got) - g * gate * u).abs();
                        assert!(
                            error <= 1e-6 * (g * u).abs(),
                            "{activation:?} {g} {u}: {got}"
                        );
                    }
                    assert_eq!(first.get_or_insert(out.clone()), &out, "{}", isa.name());
                }
            }
        }
    }

    #[test]
    fn chosen_tiles_have_the_bits_of_the_whole_product_and_the_rest_is_impossible() {
        let r = &mut Random(7);
        let pool = Pool::new(2);
        for t in TensorType::ALL {
            // A part whose last tile is not whole, and one after it.
            let (sizes, inputs) = ([101, 80], 256);
            let outputs = sizes[0] + sizes[1];
            let mut pack =
                |rows| Tiles::pack(t, rows, inputs, &random_blocks(t, rows, inputs, r), &pool);
            let parts = sizes.map(&mut pack).into();
            let bias: Vec<f32> = (0..outputs).map(|i| i as f32 * 0.1).collect();
            let matrix = Matrix::new(parts, Some(&bias));
            assert_eq!(matrix.tiles(), 7 + 5);
            let tile_of = |output: usize| match output.checked_sub(sizes[0]) {
                None => output / LANES,
                Some(output) => 7 + output / LANES,
            };
            for rows in [1, 3, 33] {
                let x = activations(rows, inputs, r);
                for chosen in [&[][..], &[6], &[0, 2, 3, 4, 6, 7, 11], &[9, 10]] {
                    for (isa, store) in Isa::available()
                        .into_iter()
                        .flat_map(|isa| [(isa, Store::Set), (isa, Store::Softcap(5.0))])
                    {
                        let mut want = vec![0.0; rows * outputs];
                        matmul(isa, &pool, &matrix, x.all(), store, &mut want);
                        for (i, want) in want.iter_mut().enumerate() {
                            if !chosen.contains(&(tile_of(i % outputs) as u32)) {
                                *want = f32::NEG_INFINITY;
                            }
                        }
                        let mut got = vec![f32::NAN; rows * outputs];
                        matmul_chosen(isa, &pool, &matrix, x.all(), store, chosen, &mut got);
                        assert_eq!(got, want, "{t:?} {} {rows} rows {chosen:?}", isa.name());
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_are_as_compact_as_the_file() {
        let r = &mut Random(4);
        for t in TensorType::ALL {
            let data = random_blocks(t, 64, 1024, r);
            let tiles = Tiles::pack(t, 64, 1024, &data, &Pool::new(1));
            let ratio = tiles.bytes() as f64 / data.len() as f64;
            let least = match t {
                // 4.25 bits of 4.5: a scale of f16.
                TensorType::NF4 | TensorType::FP4 => 0.94,
                _ => 0.99,
            };
            assert!((least..1.05).contains(&ratio), "{t:?}: {ratio}");
        }
    }
}

//! The resident layout of a weight matrix: tiles of 16 output rows, compact as the file, and the packing into it.
//!
//! A tile runs along the inputs in blocks of 32. A block of a quantised type is its codes (unsigned, bit planes, in the
//! order in which the micro-kernel's four-byte dots want them) followed by its scales for the 16 rows; types with
//! super-blocks put the super-block's scales once before eight blocks. A number is `scale * code + offset`.

use std::ops::Range;
use std::slice::ChunksExact;

use crate::activations::Scales;
use crate::mmap::{Arena, Room};
use crate::pool::Pool;
use half::f16;

use crate::quant::{
    E2M1_DOUBLED, FP4_VALUES, IQ4_VALUES, NF4_VALUES, TensorType, iq4_xs_scale, k_scale_min,
    q3_k_scale,
};
use crate::simd::{LANES, Simd};

/// Inputs in a block.
pub const BLOCK: usize = 32;
/// Outputs of a tile.
pub const TILE: usize = LANES;

/// Bytes of a matrix that are packed between two reports.
const SLICE: usize = 8 << 20;

/// How one quantised type lies in a tile, and how a block of it is unpacked.
///
/// # Safety
/// The pointers are at the start of a super-block, or of a block, of a tile of this type.
pub(crate) trait Format {
    /// Blocks that share one head.
    const SUPER: usize;
    /// Bytes of that head.
    const HEAD: usize;
    /// Bytes of the codes of a block, then of its scales.
    const CODES: usize;
    const SCALES: usize;
    /// The two halves of a block have scales of their own.
    const HALVES: bool;
    /// The zero point is 2 to this power for all blocks: a number is `scale * (code - zero)`. `None`: blocks have offsets.
    const ZERO: Option<u32>;
    /// Codes are at most 127.
    const SMALL: bool = true;
    /// What a product is multiplied by in the end.
    const UNIT: f32 = 1.0;
    /// How the activations that it meets share a scale: a block's, or the super-block's.
    const ACTIVATIONS: Scales = match Self::SUPER {
        8 => Scales::Super,
        _ => Scales::Block,
    };

    /// The super-block's scale and minimum scale.
    unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2];
    /// The block's codes: step `s` holds inputs `4 s .. 4 s + 4` of the 16 rows.
    unsafe fn steps<S: Simd>(p: *const u8) -> [S::I; 8];
    /// Scale and offset of the block; of its half `half` the scale and what is taken away.
    unsafe fn scale<S: Simd>(p: *const u8, head: [S::F; 2], half: usize) -> (S::F, S::F);
}

/// Low nibbles are even steps, high nibbles odd ones.
#[inline(always)]
unsafe fn nibbles<S: Simd>(p: *const u8) -> [S::I; 8] {
    unsafe {
        let w = [
            S::load(p),
            S::load(p.add(64)),
            S::load(p.add(128)),
            S::load(p.add(192)),
        ];
        [
            S::and(w[0], 15),
            S::shr_mask::<4>(w[0], 15),
            S::and(w[1], 15),
            S::shr_mask::<4>(w[1], 15),
            S::and(w[2], 15),
            S::shr_mask::<4>(w[2], 15),
            S::and(w[3], 15),
            S::shr_mask::<4>(w[3], 15),
        ]
    }
}

/// One bit per code: bit `s` of a byte belongs to step `s`; returned at bit `AT` of each code (4 or 2).
#[inline(always)]
unsafe fn bit_plane<S: Simd>(p: *const u8, at4: bool) -> [S::I; 8] {
    unsafe {
        let h = S::load(p);
        if at4 {
            [
                S::shl_mask::<4>(h, 16),
                S::shl_mask::<3>(h, 16),
                S::shl_mask::<2>(h, 16),
                S::shl_mask::<1>(h, 16),
                S::and(h, 16),
                S::shr_mask::<1>(h, 16),
                S::shr_mask::<2>(h, 16),
                S::shr_mask::<3>(h, 16),
            ]
        } else {
            [
                S::shl_mask::<2>(h, 4),
                S::shl_mask::<1>(h, 4),
                S::and(h, 4),
                S::shr_mask::<1>(h, 4),
                S::shr_mask::<2>(h, 4),
                S::shr_mask::<3>(h, 4),
                S::shr_mask::<4>(h, 4),
                S::shr_mask::<5>(h, 4),
            ]
        }
    }
}

/// Two bits per code: byte plane `s / 4`, bits `2 (s % 4)`; returned at the bottom of each code.
#[inline(always)]
unsafe fn pair_plane<S: Simd>(p: *const u8) -> [S::I; 8] {
    unsafe {
        let (a, b) = (S::load(p), S::load(p.add(64)));
        [
            S::and(a, 3),
            S::shr_mask::<2>(a, 3),
            S::shr_mask::<4>(a, 3),
            S::shr_mask::<6>(a, 3),
            S::and(b, 3),
            S::shr_mask::<2>(b, 3),
            S::shr_mask::<4>(b, 3),
            S::shr_mask::<6>(b, 3),
        ]
    }
}

/// The same pairs, at bits 4 and 5.
#[inline(always)]
unsafe fn pair_plane_high<S: Simd>(p: *const u8) -> [S::I; 8] {
    unsafe {
        let (a, b) = (S::load(p), S::load(p.add(64)));
        [
            S::shl_mask::<4>(a, 48),
            S::shl_mask::<2>(a, 48),
            S::and(a, 48),
            S::shr_mask::<2>(a, 48),
            S::shl_mask::<4>(b, 48),
            S::shl_mask::<2>(b, 48),
            S::and(b, 48),
            S::shr_mask::<2>(b, 48),
        ]
    }
}

#[inline(always)]
unsafe fn or_all<S: Simd>(a: [S::I; 8], b: [S::I; 8]) -> [S::I; 8] {
    unsafe {
        [
            S::or(a[0], b[0]),
            S::or(a[1], b[1]),
            S::or(a[2], b[2]),
            S::or(a[3], b[3]),
            S::or(a[4], b[4]),
            S::or(a[5], b[5]),
            S::or(a[6], b[6]),
            S::or(a[7], b[7]),
        ]
    }
}

#[inline(always)]
unsafe fn lookup_all<S: Simd>(a: [S::I; 8], t: &[u8; 16]) -> [S::I; 8] {
    unsafe {
        [
            S::lookup(a[0], t),
            S::lookup(a[1], t),
            S::lookup(a[2], t),
            S::lookup(a[3], t),
            S::lookup(a[4], t),
            S::lookup(a[5], t),
            S::lookup(a[6], t),
            S::lookup(a[7], t),
        ]
    }
}

#[inline(always)]
unsafe fn bytes8<S: Simd>(p: *const u8) -> [S::I; 8] {
    unsafe {
        [
            S::load(p),
            S::load(p.add(64)),
            S::load(p.add(128)),
            S::load(p.add(192)),
            S::load(p.add(256)),
            S::load(p.add(320)),
            S::load(p.add(384)),
            S::load(p.add(448)),
        ]
    }
}

/// A format without super-blocks: an f16 scale per row, and an f16 minimum (`MIN`) or a fixed zero point.
macro_rules! plain_format {
    ($name:ident, codes $codes:expr, min $min:expr, zero $zero:expr, small $small:expr, |$p:ident| $steps:expr) => {
        pub(crate) struct $name;
        impl Format for $name {
            const SUPER: usize = 1;
            const HEAD: usize = 0;
            const CODES: usize = $codes;
            const SCALES: usize = if $min { 64 } else { 32 };
            const HALVES: bool = false;
            const ZERO: Option<u32> = $zero;
            const SMALL: bool = $small;
            #[inline(always)]
            unsafe fn head<S: Simd>(_: *const u8) -> [S::F; 2] {
                unsafe { [S::splat(0.0); 2] }
            }
            #[inline(always)]
            unsafe fn steps<S: Simd>($p: *const u8) -> [S::I; 8] {
                unsafe { $steps }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(p: *const u8, _: [S::F; 2], _: usize) -> (S::F, S::F) {
                unsafe {
                    let d = S::load_f16(p.cast());
                    let offset = if $min {
                        S::load_f16(p.add(32).cast())
                    } else {
                        S::splat(0.0)
                    };
                    (d, offset)
                }
            }
        }
    };
}

/// The zero points that make signed table values unsigned codes, as powers of 2.
const IQ4_ZERO: u32 = 7;
const MXFP4_ZERO: u32 = 4;

const fn biased(values: &[i8; 16], zero: u32) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (values[i] as i16 + (1 << zero)) as u8;
        i += 1;
    }
    out
}
static IQ4_TABLE: [u8; 16] = biased(&IQ4_VALUES, IQ4_ZERO);
static MXFP4_TABLE: [u8; 16] = biased(&E2M1_DOUBLED, MXFP4_ZERO);

plain_format!(Q4_0, codes 256, min false, zero Some(3), small true, |p| nibbles::<S>(p));
plain_format!(Q4_1, codes 256, min true, zero None, small true, |p| nibbles::<S>(p));
plain_format!(Q5_0, codes 320, min false, zero Some(4), small true, |p| or_all::<S>(nibbles::<S>(p), bit_plane::<S>(p.add(256), true)));
plain_format!(Q5_1, codes 320, min true, zero None, small true, |p| or_all::<S>(nibbles::<S>(p), bit_plane::<S>(p.add(256), true)));
plain_format!(Q8_0, codes 512, min false, zero Some(7), small false, |p| bytes8::<S>(p));
plain_format!(Iq4Nl, codes 256, min false, zero Some(IQ4_ZERO), small false, |p| lookup_all::<S>(nibbles::<S>(p), &IQ4_TABLE));

pub(crate) struct Mxfp4;
impl Format for Mxfp4 {
    const SUPER: usize = 1;
    const HEAD: usize = 0;
    const CODES: usize = 256;
    const SCALES: usize = 16;
    const HALVES: bool = false;
    const ZERO: Option<u32> = Some(MXFP4_ZERO);
    #[inline(always)]
    unsafe fn head<S: Simd>(_: *const u8) -> [S::F; 2] {
        unsafe { [S::splat(0.0); 2] }
    }
    #[inline(always)]
    unsafe fn steps<S: Simd>(p: *const u8) -> [S::I; 8] {
        unsafe { lookup_all::<S>(nibbles::<S>(p), &MXFP4_TABLE) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(p: *const u8, _: [S::F; 2], _: usize) -> (S::F, S::F) {
        unsafe { (S::load_e8m0(p), S::splat(0.0)) }
    }
}

/// Into how many steps the largest number is cut. With so many the table's values are nearest to whole numbers of
/// them: 0.0017 of the largest off on average, where 127 have 0.0022.
pub(crate) const NF4_STEPS: f32 = 112.03;
/// All values but 0.0625 / 12 are whole numbers then.
pub(crate) const FP4_STEPS: f32 = 120.0;

const fn whole(values: &[f32; 16], steps: f32) -> [i8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        let x = values[i] * steps;
        out[i] = (if x < 0.0 { x - 0.5 } else { x + 0.5 }) as i8;
        i += 1;
    }
    out
}
/// What the codes count in tiles: the table's values to the nearest step.
pub(crate) const NF4_WHOLE: [i8; 16] = whole(&NF4_VALUES, NF4_STEPS);
pub(crate) const FP4_WHOLE: [i8; 16] = whole(&FP4_VALUES, FP4_STEPS);
static NF4_TABLE: [u8; 16] = biased(&NF4_WHOLE, IQ4_ZERO);
static FP4_TABLE: [u8; 16] = biased(&FP4_WHOLE, IQ4_ZERO);

/// Two blocks share an f16 scale: their largest number. Steps of it are counted at the very end, so that small numbers
/// keep f16's precision.
macro_rules! bitsandbytes_format {
    ($name:ident, $table:expr, $steps:expr) => {
        pub(crate) struct $name;
        impl Format for $name {
            const SUPER: usize = 2;
            const HEAD: usize = 32;
            const CODES: usize = 256;
            const SCALES: usize = 0;
            const HALVES: bool = false;
            const ZERO: Option<u32> = Some(IQ4_ZERO);
            const SMALL: bool = false;
            const UNIT: f32 = 1.0 / $steps;
            #[inline(always)]
            unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2] {
                unsafe { [S::load_f16(p.cast()), S::splat(0.0)] }
            }
            #[inline(always)]
            unsafe fn steps<S: Simd>(p: *const u8) -> [S::I; 8] {
                unsafe { lookup_all::<S>(nibbles::<S>(p), &$table) }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(_: *const u8, head: [S::F; 2], _: usize) -> (S::F, S::F) {
                unsafe { (head[0], S::splat(0.0)) }
            }
        }
    };
}
bitsandbytes_format!(Nf4, NF4_TABLE, NF4_STEPS);
bitsandbytes_format!(Fp4, FP4_TABLE, FP4_STEPS);

/// A K-quant whose blocks have an 8-bit scale and an 8-bit minimum per row (Q4_K, Q5_K).
macro_rules! k_min_format {
    ($name:ident, codes $codes:expr, |$p:ident| $steps:expr) => {
        pub(crate) struct $name;
        impl Format for $name {
            const SUPER: usize = 8;
            const HEAD: usize = 64;
            const CODES: usize = $codes;
            const SCALES: usize = 32;
            const HALVES: bool = false;
            const ZERO: Option<u32> = None;
            #[inline(always)]
            unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2] {
                unsafe { [S::load_f16(p.cast()), S::load_f16(p.add(32).cast())] }
            }
            #[inline(always)]
            unsafe fn steps<S: Simd>($p: *const u8) -> [S::I; 8] {
                unsafe { $steps }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(p: *const u8, head: [S::F; 2], _: usize) -> (S::F, S::F) {
                unsafe {
                    let scale = S::mul(head[0], S::load_u8(p, 0, 255));
                    let min = S::mul(head[1], S::load_u8(p.add(16), 0, 255));
                    (scale, S::mul(min, S::splat(-1.0)))
                }
            }
        }
    };
}
k_min_format!(Q4K, codes 256, |p| nibbles::<S>(p));
k_min_format!(Q5K, codes 320, |p| or_all::<S>(nibbles::<S>(p), bit_plane::<S>(p.add(256), true)));

/// A K-quant with a signed 8-bit scale per row and half block (`HALVES`) or block, and a fixed zero point.
macro_rules! k_signed_format {
    ($name:ident, codes $codes:expr, halves $halves:expr, zero $zero:expr, small $small:expr, |$p:ident| $steps:expr) => {
        pub(crate) struct $name;
        impl Format for $name {
            const SUPER: usize = 8;
            const HEAD: usize = 32;
            const CODES: usize = $codes;
            const SCALES: usize = if $halves { 32 } else { 16 };
            const HALVES: bool = $halves;
            const ZERO: Option<u32> = Some($zero);
            const SMALL: bool = $small;
            #[inline(always)]
            unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2] {
                unsafe { [S::load_f16(p.cast()), S::splat(0.0)] }
            }
            #[inline(always)]
            unsafe fn steps<S: Simd>($p: *const u8) -> [S::I; 8] {
                unsafe { $steps }
            }
            #[inline(always)]
            unsafe fn scale<S: Simd>(p: *const u8, head: [S::F; 2], half: usize) -> (S::F, S::F) {
                unsafe { (S::mul(head[0], S::load_i8(p.add(16 * half))), S::splat(0.0)) }
            }
        }
    };
}
k_signed_format!(Q3K, codes 192, halves true, zero 2, small true, |p| or_all::<S>(pair_plane::<S>(p), bit_plane::<S>(p.add(128), false)));
k_signed_format!(Q6K, codes 384, halves true, zero 5, small true, |p| or_all::<S>(nibbles::<S>(p), pair_plane_high::<S>(p.add(256))));
k_signed_format!(Iq4Xs, codes 256, halves false, zero IQ4_ZERO, small false, |p| lookup_all::<S>(nibbles::<S>(p), &IQ4_TABLE));

pub(crate) struct Q2K;
impl Format for Q2K {
    const SUPER: usize = 8;
    const HEAD: usize = 64;
    const CODES: usize = 128;
    const SCALES: usize = 32;
    const HALVES: bool = true;
    const ZERO: Option<u32> = None;
    #[inline(always)]
    unsafe fn head<S: Simd>(p: *const u8) -> [S::F; 2] {
        unsafe { [S::load_f16(p.cast()), S::load_f16(p.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn steps<S: Simd>(p: *const u8) -> [S::I; 8] {
        unsafe { pair_plane::<S>(p) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(p: *const u8, head: [S::F; 2], half: usize) -> (S::F, S::F) {
        unsafe {
            let p = p.add(16 * half);
            let scale = S::mul(head[0], S::load_u8(p, 0, 15));
            (scale, S::mul(head[1], S::load_u8(p, 4, 15)))
        }
    }
}

/// Bytes of a super-block of a format, all 16 rows.
pub(crate) const fn super_bytes<F: Format>() -> usize {
    F::HEAD + F::SUPER * (F::CODES + F::SCALES)
}

/// Inputs and bytes of one super-block of a tile; for float types, of one input, or of a pair of them.
fn geometry(tensor_type: TensorType) -> (usize, usize) {
    use TensorType as T;
    fn of<F: Format>() -> (usize, usize) {
        (F::SUPER * BLOCK, super_bytes::<F>())
    }
    match tensor_type {
        T::F32 => (1, 4 * LANES),
        T::F16 => (1, 2 * LANES),
        T::BF16 => (2, 4 * LANES),
        T::Q4_0 => of::<Q4_0>(),
        T::Q4_1 => of::<Q4_1>(),
        T::Q5_0 => of::<Q5_0>(),
        T::Q5_1 => of::<Q5_1>(),
        T::Q8_0 => of::<Q8_0>(),
        T::Q2_K => of::<Q2K>(),
        T::Q3_K => of::<Q3K>(),
        T::Q4_K => of::<Q4K>(),
        T::Q5_K => of::<Q5K>(),
        T::Q6_K => of::<Q6K>(),
        T::IQ4_NL => of::<Iq4Nl>(),
        T::IQ4_XS => of::<Iq4Xs>(),
        T::MXFP4 => of::<Mxfp4>(),
        T::NF4 => of::<Nf4>(),
        T::FP4 => of::<Fp4>(),
    }
}

/// A weight matrix `[rows, inputs]` in tiles.
pub struct Tiles {
    tensor_type: TensorType,
    rows: usize,
    inputs: usize,
    tile_bytes: usize,
    memory: Room,
}

impl Tiles {
    /// Pack a matrix as the file has it: `rows` rows of `tensor_type` blocks over `inputs` numbers. In parallel.
    ///
    /// # Panics
    /// When `data` is not `rows * row_bytes(inputs)` long: the reader of the file checked that.
    pub fn pack(
        tensor_type: TensorType,
        rows: usize,
        inputs: usize,
        data: &[u8],
        pool: &Pool,
    ) -> Self {
        let arena = Arena::with_pieces(0);
        Self::pack_in(&arena, tensor_type, rows, inputs, data, pool, |_| ())
    }

    /// The same, in memory that an `arena` has for a model's many matrices. `packed` is told which bytes of `data` were
    /// read for the last time.
    ///
    /// # Panics
    /// As `pack`, and when there is no memory.
    pub fn pack_in(
        arena: &Arena,
        tensor_type: TensorType,
        rows: usize,
        inputs: usize,
        data: &[u8],
        pool: &Pool,
        packed: impl Fn(Range<usize>),
    ) -> Self {
        let row_bytes = row_bytes(tensor_type, inputs);
        assert_eq!(
            data.len(),
            rows * row_bytes,
            "bytes of a {rows} x {inputs} {tensor_type:?} matrix"
        );
        let tile = |rows: Range<usize>, out: &mut [u8]| {
            let data = &data[rows.start * row_bytes..rows.end * row_bytes];
            pack_tile(tensor_type, data, row_bytes, out);
        };
        let packed = |rows: Range<usize>| packed(rows.start * row_bytes..rows.end * row_bytes);
        Self::new_in(arena, tensor_type, (rows, inputs), pool, tile, packed)
    }

    /// The same of blocks that are made as they are packed: `row(i, out)` writes those of row `i`. `packed` is told which
    /// rows are done.
    ///
    /// # Panics
    /// When rows of `inputs` are no whole blocks, and when there is no memory.
    pub fn pack_made(
        arena: &Arena,
        tensor_type: TensorType,
        (rows, inputs): (usize, usize),
        pool: &Pool,
        row: impl Fn(usize, &mut [u8]) + Sync,
        packed: impl Fn(Range<usize>),
    ) -> Self {
        let row_bytes = row_bytes(tensor_type, inputs);
        let tile = |rows: Range<usize>, out: &mut [u8]| {
            let mut data = vec![0; rows.len() * row_bytes];
            for (i, data) in rows.zip(data.chunks_exact_mut(row_bytes)) {
                row(i, data);
            }
            pack_tile(tensor_type, &data, row_bytes, out);
        };
        Self::new_in(arena, tensor_type, (rows, inputs), pool, tile, packed)
    }

    /// Fill tiles in parallel: `tile(rows, out)`.
    fn new_in(
        arena: &Arena,
        tensor_type: TensorType,
        (rows, inputs): (usize, usize),
        pool: &Pool,
        tile: impl Fn(Range<usize>, &mut [u8]) + Sync,
        packed: impl Fn(Range<usize>),
    ) -> Self {
        let (step, bytes) = geometry(tensor_type);
        let tile_bytes = (inputs.div_ceil(step) * bytes).next_multiple_of(64);
        let size = rows.div_ceil(LANES) * tile_bytes;
        let mut memory = arena
            .take(size)
            .unwrap_or_else(|e| panic!("no memory for {size} bytes of weights: {e}"));
        let slice = (SLICE / tile_bytes.max(1)).max(1);
        for (i, memory) in memory.chunks_mut((slice * tile_bytes).max(1)).enumerate() {
            let first = i * slice * LANES;
            pool.rows(memory, tile_bytes, |i, out| {
                let first = first + i * LANES;
                tile(first..rows.min(first + LANES), out);
            });
            packed(first..rows.min(first + slice * LANES));
        }
        Self {
            tensor_type,
            rows,
            inputs,
            tile_bytes,
            memory,
        }
    }

    pub fn tensor_type(&self) -> TensorType {
        self.tensor_type
    }
    pub fn rows(&self) -> usize {
        self.rows
    }
    pub fn inputs(&self) -> usize {
        self.inputs
    }
    /// Tiles of 16 rows; the last may be padded with zeros.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }
    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }
    /// The bytes of tile `i`.
    pub(crate) fn tile(&self, i: usize) -> &[u8] {
        &self.memory[i * self.tile_bytes..(i + 1) * self.tile_bytes]
    }
}

fn row_bytes(tensor_type: TensorType, inputs: usize) -> usize {
    tensor_type
        .row_bytes(inputs)
        .expect("inputs are whole blocks")
}

fn pack_tile(tensor_type: TensorType, data: &[u8], row_bytes: usize, out: &mut [u8]) {
    use TensorType as T;
    let rows = data.chunks_exact(row_bytes);
    match tensor_type {
        T::F32 | T::BF16 => transpose::<4>(rows, out),
        T::F16 => transpose::<2>(rows, out),
        T::Q4_0 | T::IQ4_NL => pack_quantised::<18, 1, 0, 4, 2, 2>(rows, out, q4_0),
        T::Q4_1 => pack_quantised::<20, 1, 0, 4, 4, 2>(rows, out, q4_1),
        T::Q5_0 => pack_quantised::<22, 1, 0, 5, 2, 2>(rows, out, q5_0),
        T::Q5_1 => pack_quantised::<24, 1, 0, 5, 4, 2>(rows, out, q5_1),
        T::Q8_0 => pack_quantised::<34, 1, 0, 8, 2, 2>(rows, out, q8_0),
        T::MXFP4 => pack_quantised::<17, 1, 0, 4, 1, 1>(rows, out, mxfp4),
        T::NF4 | T::FP4 => pack_quantised::<36, 2, 1, 4, 0, 1>(rows, out, of_64),
        T::Q2_K => pack_quantised::<84, 8, 2, 2, 2, 1>(rows, out, q2_k),
        T::Q3_K => pack_quantised::<110, 8, 1, 3, 2, 1>(rows, out, q3_k),
        T::Q4_K => pack_quantised::<144, 8, 2, 4, 2, 1>(rows, out, q4_k),
        T::Q5_K => pack_quantised::<176, 8, 2, 5, 2, 1>(rows, out, q5_k),
        T::Q6_K => pack_quantised::<210, 8, 1, 6, 2, 1>(rows, out, q6_k),
        T::IQ4_XS => pack_quantised::<136, 8, 1, 4, 1, 1>(rows, out, iq4_xs),
    }
}

/// Float types: `N` bytes, which are an input or a pair of them, by `N` bytes, the 16 rows side by side.
fn transpose<const N: usize>(rows: ChunksExact<u8>, out: &mut [u8]) {
    let (out, _) = out.as_chunks_mut::<N>();
    for (r, row) in rows.enumerate() {
        let (all, rest) = row.as_chunks::<N>();
        for (i, numbers) in all.iter().enumerate() {
            out[i * LANES + r] = *numbers;
        }
        if !rest.is_empty() {
            // Half a pair.
            out[all.len() * LANES + r][..rest.len()].copy_from_slice(rest);
        }
    }
}

/// One row's super-block of the file, taken apart.
struct Unpacked {
    /// Unsigned codes, block by block in input order.
    codes: [[u8; BLOCK]; 8],
    /// Head bytes: f16 scale, f16 minimum scale.
    head: [[u8; 2]; 2],
    /// Per block: what the format's scale bytes are for this row (f16 pairs, or bytes).
    scales: [[u8; 4]; 8],
}

/// Rows of blocks of `FILE` bytes, each `BLOCKS` blocks of 32 codes of `BITS` bits, into a tile. Per row and super-block
/// there are `HEADS` f16 numbers, per row and block `SCALES` bytes of scales, each `WIDTH` wide. Everything is a constant,
/// and `take_apart` inlined, because packing is most of the time that loading takes.
fn pack_quantised<
    const FILE: usize,
    const BLOCKS: usize,
    const HEADS: usize,
    const BITS: usize,
    const SCALES: usize,
    const WIDTH: usize,
>(
    rows: ChunksExact<u8>,
    out: &mut [u8],
    take_apart: impl Fn(&[u8; FILE], &mut Unpacked),
) {
    let (codes_bytes, scales_bytes) = (64 * BITS, LANES * SCALES);
    let block_bytes = codes_bytes + scales_bytes;
    let mut unpacked = Unpacked {
        codes: [[0; BLOCK]; 8],
        head: [[0; 2]; 2],
        scales: [[0; 4]; 8],
    };
    for (r, row) in rows.enumerate() {
        let supers = out.chunks_exact_mut(32 * HEADS + BLOCKS * block_bytes);
        for (block, out) in row.as_chunks::<FILE>().0.iter().zip(supers) {
            take_apart(block, &mut unpacked);
            let (head, blocks) = out.split_at_mut(32 * HEADS);
            for (half, out) in unpacked.head.iter().zip(head.chunks_exact_mut(32)) {
                out[2 * r..2 * r + 2].copy_from_slice(half);
            }
            let blocks = blocks.chunks_exact_mut(block_bytes);
            for ((codes, scales), out) in unpacked.codes.iter().zip(&unpacked.scales).zip(blocks) {
                let (planes, out) = out.split_at_mut(codes_bytes);
                put_codes::<BITS>(codes, r, planes);
                for i in 0..SCALES / WIDTH {
                    out[(i * LANES + r) * WIDTH..][..WIDTH]
                        .copy_from_slice(&scales[i * WIDTH..][..WIDTH]);
                }
            }
        }
    }
}

/// Spread one row's 32 codes over the planes of a block. A step's four codes are handled as one word.
#[inline(always)]
fn put_codes<const BITS: usize>(codes: &[u8; BLOCK], row: usize, out: &mut [u8]) {
    let mut steps = [0u32; 8];
    for (step, codes) in steps.iter_mut().zip(codes.as_chunks().0) {
        *step = u32::from_le_bytes(*codes);
    }
    let (planes, _) = out[..64 * BITS].as_chunks_mut::<64>();
    let mut put = |plane: usize, word: u32| {
        planes[plane][4 * row..4 * row + 4].copy_from_slice(&word.to_le_bytes())
    };
    match BITS {
        8 => (0..8).for_each(|i| put(i, steps[i])),
        2 | 3 => {
            put(0, beside::<2, 4>(&steps[..4], 0));
            put(1, beside::<2, 4>(&steps[4..], 0));
        }
        _ => (0..4).for_each(|i| put(i, beside::<4, 2>(&steps[2 * i..], 0))),
    }
    match BITS {
        3 => put(2, beside::<1, 8>(&steps, 2)),
        5 => put(4, beside::<1, 8>(&steps, 4)),
        6 => {
            put(4, beside::<2, 4>(&steps[..4], 4));
            put(5, beside::<2, 4>(&steps[4..], 4));
        }
        _ => {}
    }
}

/// Bits `from .. from + WIDTH` of each byte of `COUNT` words, side by side in the bytes of one.
#[inline(always)]
fn beside<const WIDTH: usize, const COUNT: usize>(words: &[u32], from: u32) -> u32 {
    let mask = ((1 << WIDTH) - 1) * 0x0101_0101;
    let mut all = 0;
    for (i, word) in words[..COUNT].iter().enumerate() {
        all |= (word >> from & mask) << (WIDTH * i);
    }
    all
}

// One row's (super-)block taken apart, as the GGUF format lays it out.

#[inline(always)]
fn q4_0(b: &[u8; 18], out: &mut Unpacked) {
    out.scales[0][..2].copy_from_slice(&b[..2]);
    split_nibbles(&b[2..18], &mut out.codes[0]);
}

#[inline(always)]
fn q4_1(b: &[u8; 20], out: &mut Unpacked) {
    out.scales[0].copy_from_slice(&b[..4]);
    split_nibbles(&b[4..20], &mut out.codes[0]);
}

#[inline(always)]
fn q5_0(b: &[u8; 22], out: &mut Unpacked) {
    out.scales[0][..2].copy_from_slice(&b[..2]);
    split_nibbles(&b[6..22], &mut out.codes[0]);
    fifth_bits(&b[2..6], &mut out.codes[0]);
}

#[inline(always)]
fn q5_1(b: &[u8; 24], out: &mut Unpacked) {
    out.scales[0].copy_from_slice(&b[..4]);
    split_nibbles(&b[8..24], &mut out.codes[0]);
    fifth_bits(&b[4..8], &mut out.codes[0]);
}

#[inline(always)]
fn q8_0(b: &[u8; 34], out: &mut Unpacked) {
    out.scales[0][..2].copy_from_slice(&b[..2]);
    for (code, q) in out.codes[0].iter_mut().zip(&b[2..34]) {
        *code = q ^ 0x80;
    }
}

#[inline(always)]
fn mxfp4(b: &[u8; 17], out: &mut Unpacked) {
    out.scales[0][0] = b[0];
    split_nibbles(&b[1..17], &mut out.codes[0]);
}

/// The largest number to the nearest f16, and at most f16's largest.
#[inline(always)]
fn of_64(b: &[u8; 36], out: &mut Unpacked) {
    let most = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let most = f16::from_f32(most).min(f16::MAX);
    out.head[0] = most.to_bits().to_le_bytes();
    for (codes, bytes) in out.codes.iter_mut().zip(b[4..].chunks_exact(16)) {
        for (codes, byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
            *codes = [byte >> 4, byte & 15];
        }
    }
}

/// 16 bytes: low nibbles are the first half, high nibbles the second.
#[inline(always)]
fn split_nibbles(bytes: &[u8], codes: &mut [u8; BLOCK]) {
    for (j, byte) in bytes.iter().enumerate() {
        codes[j] = byte & 15;
        codes[j + 16] = byte >> 4;
    }
}

#[inline(always)]
fn fifth_bits(bytes: &[u8], codes: &mut [u8; BLOCK]) {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (j, code) in codes.iter_mut().enumerate() {
        *code |= ((bits >> j & 1) as u8) << 4;
    }
}

#[inline(always)]
fn q2_k(b: &[u8; 84], out: &mut Unpacked) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    out.head = [[b[80], b[81]], [b[82], b[83]]];
    for block in 0..8 {
        let (n, shift) = (block / 4, 2 * (block % 4));
        for (l, code) in out.codes[block].iter_mut().enumerate() {
            *code = qs[32 * n + l] >> shift & 3;
        }
        out.scales[block][..2].copy_from_slice(&scales[2 * block..2 * block + 2]);
    }
}

#[inline(always)]
fn q3_k(b: &[u8; 110], out: &mut Unpacked) {
    let (mask, qs, scales) = (&b[..32], &b[32..96], &b[96..108]);
    out.head[0] = [b[108], b[109]];
    for block in 0..8 {
        let (n, shift) = (block / 4, 2 * (block % 4));
        for (l, code) in out.codes[block].iter_mut().enumerate() {
            *code = (qs[32 * n + l] >> shift & 3) | (mask[l] >> block & 1) << 2;
        }
        for half in 0..2 {
            out.scales[block][half] = q3_k_scale(2 * block + half, scales) as u8;
        }
    }
}

#[inline(always)]
fn q4_k(b: &[u8; 144], out: &mut Unpacked) {
    out.head = [[b[0], b[1]], [b[2], b[3]]];
    for block in 0..8 {
        let (scale, min) = k_scale_min(block, &b[4..16]);
        out.scales[block][..2].copy_from_slice(&[scale, min]);
        let qs = &b[16 + 32 * (block / 2)..][..32];
        for (code, q) in out.codes[block].iter_mut().zip(qs) {
            *code = q >> (4 * (block % 2)) & 15;
        }
    }
}

#[inline(always)]
fn q5_k(b: &[u8; 176], out: &mut Unpacked) {
    out.head = [[b[0], b[1]], [b[2], b[3]]];
    for block in 0..8 {
        let (scale, min) = k_scale_min(block, &b[4..16]);
        out.scales[block][..2].copy_from_slice(&[scale, min]);
        let (high, qs) = (&b[16..48], &b[48 + 32 * (block / 2)..][..32]);
        for (l, code) in out.codes[block].iter_mut().enumerate() {
            *code = (qs[l] >> (4 * (block % 2)) & 15) | (high[l] >> block & 1) << 4;
        }
    }
}

#[inline(always)]
fn q6_k(b: &[u8; 210], out: &mut Unpacked) {
    let (ql, qh, scales) = (&b[..128], &b[128..192], &b[192..208]);
    out.head[0] = [b[208], b[209]];
    for block in 0..8 {
        let (n, quarter) = (block / 4, block % 4);
        let low = &ql[64 * n + 32 * (quarter % 2)..][..32];
        for (l, code) in out.codes[block].iter_mut().enumerate() {
            *code =
                (low[l] >> (4 * (quarter / 2)) & 15) | (qh[32 * n + l] >> (2 * quarter) & 3) << 4;
        }
        out.scales[block][..2].copy_from_slice(&scales[2 * block..2 * block + 2]);
    }
}

#[inline(always)]
fn iq4_xs(b: &[u8; 136], out: &mut Unpacked) {
    out.head[0] = [b[0], b[1]];
    let high = u16::from_le_bytes([b[2], b[3]]);
    for block in 0..8 {
        out.scales[block][0] = iq4_xs_scale(block, high, &b[4..8]) as u8;
        split_nibbles(&b[8 + 16 * block..][..16], &mut out.codes[block]);
    }
}

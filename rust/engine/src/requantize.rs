//! A model's tensors in other types: one at a time, on all threads.

use std::collections::HashMap;
use std::path::Path;

use hfcore_kernels::pool::Pool;
use hfcore_kernels::quant::{TensorType, dequantize};
use hfcore_kernels::quantize::quantize;

use crate::error::{Error, Result};
use crate::gguf::write::{Planned, Writer};
use crate::recipe::Recipe;
use crate::weights::{Tensor, Weights};
use crate::{files, gguf};

/// Types that hold a model as it was made: others have lost something already.
const WHOLE: [TensorType; 4] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
];

/// How much an error of each input counts, by the name of the tensor: the mean square of what went into it
/// (llama.cpp's `llama-imatrix`). As long as a row; of experts, a row for each.
#[derive(Debug, Default)]
pub struct Importance(HashMap<String, Vec<f32>>);

impl Importance {
    /// From a GGUF file of `llama-imatrix`: tensors `NAME.in_sum2` and `NAME.counts`.
    ///
    /// # Errors
    /// [`Error::ModelFile`] for a file that is none, or damaged.
    pub fn read(path: &Path) -> Result<Self> {
        let file = gguf::open(path)?;
        let mut all = HashMap::new();
        for name in file.tensors.keys() {
            let Some(tensor) = name.strip_suffix(".in_sum2") else {
                continue;
            };
            let sums = file.require(name)?;
            let counts = file.require(&format!("{tensor}.counts"))?.dequantize();
            let (rows, cols) = (sums.rows(), sums.cols());
            if counts.len() != rows {
                let problem = format!(
                    "{tensor} has {rows} rows of sums and {} counts",
                    counts.len()
                );
                return Err(file.problem(problem));
            }
            let mut means = sums.dequantize();
            for (row, count) in means.chunks_exact_mut(cols.max(1)).zip(counts) {
                row.iter_mut().for_each(|x| *x /= count.max(1.0));
            }
            if !means.iter().all(|x| x.is_finite() && *x >= 0.0) {
                return Err(file.problem(format!("{tensor} has sums of squares that are none")));
            }
            all.insert(tensor.to_owned(), means);
        }
        match all.is_empty() {
            true => Err(file.problem("holds no importance matrix: no tensor NAME.in_sum2")),
            false => Ok(Self(all)),
        }
    }

    /// For the rows of a tensor from `row` on.
    fn of(&self, tensor: &Tensor, row: usize) -> Option<&[f32]> {
        let means = self.0.get(tensor.name)?;
        let cols = tensor.cols();
        let experts = means
            .len()
            .checked_div(cols)
            .filter(|n| n * cols == means.len())?;
        let each = tensor.rows().checked_div(experts).filter(|n| *n > 0)?;
        means.get(row / each * cols..(row / each + 1) * cols)
    }
}

/// The blocks of `tensor` in the type `to`.
///
/// # Errors
/// [`Error::ModelFile`] where rows of it are no whole number of blocks.
pub fn tensor(
    pool: &Pool,
    from: &Tensor,
    to: TensorType,
    importance: &Importance,
) -> Result<Vec<u8>> {
    let (rows, cols) = (from.rows(), from.cols());
    let row_bytes = to
        .row_bytes(cols)
        .filter(|n| *n > 0)
        .ok_or_else(|| Error::ModelFile {
            path: from.name.to_owned(),
            problem: format!("rows of {cols} numbers are no blocks of {}", to.name()),
        })?;
    let mut out = vec![0; rows * row_bytes];
    pool.rows(&mut out, row_bytes, |row, out| {
        let mut numbers = vec![0.0; cols];
        dequantize(from.tensor_type, from.row(row), &mut numbers);
        quantize(to, &numbers, importance.of(from, row), out);
    });
    Ok(out)
}

/// What is to become of a file.
pub struct Wanted {
    pub recipe: Recipe,
    pub importance: Importance,
    /// Also what was quantised before: its errors add up.
    pub again: bool,
}

/// What became of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requantized {
    pub tensors: usize,
    /// Of all tensors, before and after.
    pub bytes_before: u64,
    pub bytes: u64,
}

/// Write the GGUF model at `source` as `wanted` says to `out`, whole or not at all. `progress(done, total)` is told in bytes
/// of the source; false stops it with `Closed`.
///
/// # Errors
/// [`Error::ModelFile`] where a file cannot be read or written; [`Error::Unsupported`] for a source that is no GGUF file, or
/// that is quantised already.
pub fn file(
    source: &Path,
    wanted: &Wanted,
    out: &Path,
    threads: Option<usize>,
    progress: &dyn Fn(u64, u64) -> bool,
) -> Result<Requantized> {
    let weights = files::open(source)?;
    if weights.config.is_some() {
        return Err(Error::Unsupported {
            what: "source",
            name: weights.path,
            supported: "GGUF files in F32, F16, BF16 or Q8_0".into(),
        });
    }
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let part = out.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let made = write(&weights, wanted, &part, threads, progress).and_then(|made| {
        std::fs::rename(&part, out).map_err(|e| Error::ModelFile {
            path: out.display().to_string(),
            problem: e.to_string(),
        })?;
        Ok(made)
    });
    if made.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    made
}

fn write(
    weights: &Weights,
    wanted: &Wanted,
    part: &Path,
    threads: Option<usize>,
    progress: &dyn Fn(u64, u64) -> bool,
) -> Result<Requantized> {
    let mut names: Vec<&String> = weights.tensors.keys().collect();
    names.sort_by_key(|name| weights.tensors.get(*name).map(|t| (t.file, t.bytes.start)));
    let tied = !weights.tensors.contains_key("output.weight");
    let architecture = weights.get_str("general.architecture")?.unwrap_or_default();
    let layers = weights
        .get_usize(&format!("{architecture}.block_count"))?
        .unwrap_or(0);
    let planned: Vec<Planned> = names
        .iter()
        .map(|name| plan(weights, name, wanted, layers, tied))
        .collect::<Result<_>>()?;
    let mut writer = Writer::begin(part, weights, wanted.recipe.file_type, &planned)?;
    let pool = Pool::new(threads.unwrap_or_else(Pool::available));
    let (total, mut done) = (weights.total_bytes(), 0);
    for tensor_plan in &planned {
        let from = weights.require(tensor_plan.name)?;
        match tensor_plan.tensor_type == from.tensor_type {
            true => writer.tensor(from.data)?,
            false => writer.tensor(&tensor(
                &pool,
                &from,
                tensor_plan.tensor_type,
                &wanted.importance,
            )?)?,
        }
        from.forget(0..from.data.len());
        done += from.data.len() as u64;
        if !progress(done, total) {
            return Err(Error::Closed);
        }
    }
    writer.end()?;
    Ok(Requantized {
        tensors: planned.len(),
        bytes_before: total,
        bytes: planned.iter().map(|tensor| tensor.bytes as u64).sum(),
    })
}

fn plan<'a>(
    weights: &'a Weights,
    name: &str,
    wanted: &Wanted,
    layers: usize,
    tied: bool,
) -> Result<Planned<'a>> {
    let tensor = weights.require(name)?;
    if !wanted.again && !WHOLE.contains(&tensor.tensor_type) {
        return Err(Error::Unsupported {
            what: "source type",
            name: format!("{} of {name}", tensor.tensor_type.name()),
            supported: WHOLE.map(TensorType::name).join(", "),
        });
    }
    let tensor_type = match tensor.shape {
        [_] | [] => tensor.tensor_type,
        shape => wanted.recipe.tensor_type(name, shape, layers, tied),
    };
    let bytes = tensor_type.row_bytes(tensor.cols()).unwrap_or(0) * tensor.rows();
    Ok(Planned {
        name: tensor.name,
        tensor_type,
        shape: tensor.shape,
        bytes,
    })
}

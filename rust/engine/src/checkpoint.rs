//! Which tensors of a checkpoint are parts of quantised matrices: by its `quantization_config`, they become [`Quantised`].
//!
//! What is quantised is known by the parts that are there. Lists of modules that were left as they are
//! (`modules_to_not_convert`, `llm_int8_skip_modules`, `ignore`, `targets`) say the same, so nobody reads them; nor how
//! activations were to be quantised, which is the device's business.

mod awq;
mod bitsandbytes;
mod compressed;
mod fp8;
mod gptq;

use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::quantised::{Dtype, Groups, Part, Quantised};
use crate::weights::Weights;

/// What scales are stored in.
const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// How a checkpoint is quantised.
#[derive(Debug)]
pub(crate) enum Scheme {
    Plain,
    /// Experts in pairs of plain bytes, `_blocks` and `_scales`: see `decoder/load.rs`.
    Mxfp4,
    Bitsandbytes,
    Gptq(gptq::Options),
    Awq,
    Compressed(compressed::Options),
    Fp8(fp8::Options),
}

const METHODS: &str = "bitsandbytes, gptq, awq, compressed-tensors, fp8, mxfp4, \
    safetensors in F32, F16 or BF16; GGUF files";

impl Scheme {
    /// What `config.json` says.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a method, or a variant of one, that is not known.
    pub(crate) fn of(config: &Json) -> Result<Self> {
        let given = ["quantization_config", "compression_config"].map(|key| config.get(key));
        let Some(own) = given.into_iter().flatten().find(|q| !q.is_null()) else {
            return Ok(Self::Plain);
        };
        let is = |key: &str| own.get(key).and_then(Json::as_bool) == Some(true);
        let old_bitsandbytes = is("load_in_4bit") || is("load_in_8bit");
        let method = own.get("quant_method").and_then(Json::as_str);
        match method {
            Some("mxfp4") => Ok(Self::Mxfp4),
            Some("bitsandbytes") => Ok(Self::Bitsandbytes),
            Some("gptq") => gptq::Options::read(own).map(Self::Gptq),
            Some("awq") => awq::check(own).map(|()| Self::Awq),
            Some("compressed-tensors") => compressed::Options::read(own).map(Self::Compressed),
            Some("fp8") => Ok(Self::Fp8(fp8::Options::read(own))),
            None if old_bitsandbytes => Ok(Self::Bitsandbytes),
            other => Err(unsupported(
                "quantisation",
                other.unwrap_or("without a quant_method"),
                METHODS,
            )),
        }
    }

    /// Make quantised matrices of their parts.
    ///
    /// # Errors
    /// [`Error::ModelFile`] where a part is missing or of another shape; [`Error::Unsupported`] for what is left over and no
    /// tensor of floats.
    pub(crate) fn gather(&self, weights: &mut Weights) -> Result<()> {
        let mut parts = Parts { weights };
        match self {
            Self::Plain | Self::Mxfp4 => {}
            Self::Bitsandbytes => bitsandbytes::gather(&mut parts)?,
            Self::Gptq(options) => gptq::gather(&mut parts, options)?,
            Self::Awq => awq::gather(&mut parts)?,
            Self::Compressed(options) => compressed::gather(&mut parts, options)?,
            Self::Fp8(options) => fp8::gather(&mut parts, options)?,
        }
        let plain = |part: &Part| matches!(self, Self::Mxfp4) && part.dtype == Dtype::U8;
        let left = weights.packed.iter().filter(|(_, part)| !plain(part));
        match left.min_by_key(|(name, _)| *name) {
            Some((name, part)) => Err(unsupported(
                "dtype",
                &format!("{} of {name}", part.dtype.name()),
                "F32, F16, BF16",
            )),
            None => Ok(()),
        }
    }
}

fn unsupported(what: &'static str, name: &str, supported: &str) -> Error {
    Error::Unsupported {
        what,
        name: name.into(),
        supported: supported.into(),
    }
}

/// A checkpoint's tensors, of which a scheme takes what is its own.
struct Parts<'a> {
    weights: &'a mut Weights,
}

impl Parts<'_> {
    /// The names that end so, without that end; in order, so that of several errors it is always the same that is told.
    fn ending(&self, end: &str) -> Vec<String> {
        let all = self
            .weights
            .packed
            .keys()
            .chain(self.weights.tensors.keys());
        let mut found: Vec<String> = all
            .filter_map(|name| name.strip_suffix(end).map(str::to_owned))
            .collect();
        found.sort_unstable();
        found
    }

    /// The names of what is stored in one of these dtypes and ends so, without that end.
    fn of_dtype(&self, end: &str, dtypes: &[Dtype]) -> Vec<String> {
        let is = |name: &String| {
            let part = self.weights.packed.get(&format!("{name}{end}"));
            part.is_some_and(|part| dtypes.contains(&part.dtype))
        };
        self.ending(end).into_iter().filter(is).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.weights.packed.contains_key(name) || self.weights.tensors.contains_key(name)
    }

    fn take(&mut self, name: &str) -> Option<Part> {
        if let Some(part) = self.weights.packed.remove(name) {
            return Some(part);
        }
        let info = self.weights.tensors.remove(name)?;
        let dtype = Dtype::from_name(info.tensor_type.name())?;
        Some(Part {
            dtype,
            shape: info.shape,
            file: info.file,
            bytes: info.bytes,
        })
    }

    /// The part of this name, without which what it belongs to is not whole.
    fn require(&mut self, name: &str) -> Result<Part> {
        self.take(name).ok_or_else(|| {
            self.weights
                .problem(format!("has no tensor {name:?}, a part of a quantised one"))
        })
    }

    /// The same, of one of these dtypes and with this shape.
    fn require_as(&mut self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<Part> {
        let part = self.require(name)?;
        self.check(name, &part, dtypes, shape)?;
        Ok(part)
    }

    fn check(&self, name: &str, part: &Part, dtypes: &[Dtype], shape: &[usize]) -> Result<()> {
        if dtypes.contains(&part.dtype) && part.shape == shape {
            return Ok(());
        }
        let (got, of) = (part.dtype.name(), &part.shape);
        let names: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
        let wanted = names.join(" or ");
        Err(self.problem(format!(
            "tensor {name:?} is {got} {of:?}, wanted {wanted} {shape:?}"
        )))
    }

    /// The two sizes of a part that is a matrix of one of these dtypes.
    fn matrix(&self, name: &str, part: &Part, dtypes: &[Dtype]) -> Result<[usize; 2]> {
        let shape = <[usize; 2]>::try_from(&part.shape[..]).unwrap_or_default();
        if shape.contains(&0) || !dtypes.contains(&part.dtype) {
            let (got, of) = (part.dtype.name(), &part.shape);
            let names: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
            let wanted = names.join(" or ");
            return Err(self.problem(format!(
                "tensor {name:?} is {got} {of:?}, wanted a matrix of {wanted}"
            )));
        }
        Ok(shape)
    }

    /// Forget the tensors that end so: activations are not quantised by what the file says.
    fn forget(&mut self, ends: &[&str]) {
        let is = |name: &String| ends.iter().any(|end| name.ends_with(end));
        self.weights.packed.retain(|name, _| !is(name));
        self.weights.tensors.retain(|name, _| !is(name));
    }

    fn insert(&mut self, name: String, matrix: Quantised) -> Result<()> {
        if matrix.shape.contains(&0) {
            return Err(self.problem(format!("tensor {name:?} has no numbers")));
        }
        if self.weights.tensors.contains_key(&name) || self.weights.quantised.contains_key(&name) {
            let problem = format!("has the tensor {name:?} quantised and a second time");
            return Err(self.problem(problem));
        }
        self.weights.quantised.insert(name, matrix);
        Ok(())
    }

    fn problem(&self, problem: String) -> Error {
        self.weights.problem(problem)
    }

    /// Who shares a scale, by the shape of the scales of a matrix: one for all, one for each output, so many groups of
    /// inputs for each, or a grid of blocks. `sizes` are those that the configuration names: where the last block is not
    /// full, the shape alone does not say how large the others are.
    fn blocks(
        &self,
        name: &str,
        scales: &[usize],
        [rows, cols]: [usize; 2],
        sizes: &[[usize; 2]],
    ) -> Result<Groups> {
        let grid = match *scales {
            [] | [1] => Some([1, 1]),
            [r] => Some([r, 1]),
            [r, c] => Some([r, c]),
            _ => None,
        };
        let fits = |[r, c]: [usize; 2]| {
            let as_named = sizes
                .iter()
                .filter(|size| !size.contains(&0))
                .find(|size| [rows.div_ceil(size[0]), cols.div_ceil(size[1])] == [r, c]);
            let even = r > 0 && c > 0 && rows.is_multiple_of(r) && cols.is_multiple_of(c);
            as_named.copied().or(even.then(|| [rows / r, cols / c]))
        };
        match grid.and_then(fits) {
            Some(size) if !size.contains(&0) => Ok(Groups::Blocks(size)),
            _ => Err(self.problem(format!(
                "tensor {name:?} is {scales:?}: so many scales do not divide [{rows}, {cols}]"
            ))),
        }
    }

    /// Groups as `index` names them for each input: `count` of them. Groups of `each` side by side are that.
    fn index(
        &self,
        name: &str,
        index: &Part,
        inputs: usize,
        each: usize,
        count: usize,
    ) -> Result<Groups> {
        self.check(name, index, &[Dtype::I32, Dtype::I64], &[inputs])?;
        let of: Vec<i64> = index.integers(&self.weights.files).collect();
        let known = |g: &i64| usize::try_from(*g).is_ok_and(|g| g < count);
        if let Some(wrong) = of.iter().find(|g| !known(g)) {
            return Err(self.problem(format!(
                "tensor {name:?} names the group {wrong}, there are {count}"
            )));
        }
        let of: Vec<u32> = of.into_iter().map(|group| group as u32).collect();
        if of
            .iter()
            .enumerate()
            .all(|(i, group)| *group as usize == i / each)
        {
            return Ok(Groups::Blocks([1, each]));
        }
        Ok(Groups::Index { of, count })
    }
}

/// A whole number in a configuration; -1, null and what is none mean that there is none.
fn whole(config: &Json, key: &str) -> Option<usize> {
    config
        .get(key)
        .and_then(Json::as_u64)
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| *n > 0)
}

/// Blocks `[outputs, inputs]` in a configuration.
fn block_size(config: &Json, key: &str) -> Option<[usize; 2]> {
    let size = config.get(key)?.as_array()?;
    let numbers: Vec<usize> = size
        .iter()
        .filter_map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok()))
        .collect();
    <[usize; 2]>::try_from(numbers).ok()
}

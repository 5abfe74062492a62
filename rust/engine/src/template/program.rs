//! A compiled template: what `lower` makes and `run` runs. Data only.

use std::collections::HashMap;
use std::sync::Arc;

use super::checks::Test;
use super::filters::Filter;
use super::methods::Method;
use super::value::Value;

#[derive(Debug)]
pub(super) struct Stmt {
    pub line: u32,
    pub kind: StmtKind,
}

#[derive(Debug)]
pub(super) enum StmtKind {
    Text(Arc<str>),
    Emit(Expr),
    /// A constant, escaped or not, whatever is the rule as it runs.
    EmitAs(bool, Expr),
    /// An index into `Program::loops`.
    For(usize),
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Body),
    Set(Target, Expr),
    /// A captured text: its target, its filter, how it is made.
    SetBlock(Target, Option<Expr>, Body),
    AutoEscape(Expr, Body),
    FilterBlock(Expr, Body),
    /// A function of `{% generation %}`, or of `{% block %}`.
    Generation(usize),
    Block(usize),
    Macro(usize, u32),
    CallBlock(Expr, usize),
    /// Names of the whole template that blocks see, and their slots.
    Export(Vec<(u32, u32)>),
    Continue,
    Break,
    /// A tag that needs other templates: there are none.
    Fail(&'static str),
}

/// Statements with names of their own, in the slots of the function around them.
#[derive(Debug, Default)]
pub(super) struct Body {
    pub enter: Vec<(u32, Enter)>,
    pub stmts: Vec<Stmt>,
    /// Slots that are empty again behind it.
    pub leave: Vec<u32>,
}

/// What a slot holds when its scope begins.
#[derive(Debug, Clone, Copy)]
pub(super) enum Enter {
    /// The caller's variable of this name.
    Global(u32),
    Copy(Place),
    Empty,
}

/// Where a variable lies: in the running function, or so many functions further out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub out: u32,
    pub slot: u32,
}

#[derive(Debug)]
pub(super) enum Target {
    Slot(u32),
    /// An attribute of the namespace in this variable.
    Attr(Expr, Arc<str>),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub(super) struct For {
    pub iter: Expr,
    /// The condition behind `if`: a function, its target and the test.
    pub filter: Option<Condition>,
    pub target: Target,
    /// The slot of `loop`, where the body reads it.
    pub loop_slot: Option<u32>,
    pub body: Body,
    pub otherwise: Body,
    /// The slots of its function, where the loop can be called.
    pub recursive: Option<u32>,
}

#[derive(Debug)]
pub(super) struct Condition {
    pub slots: u32,
    pub target: Target,
    pub enter: Vec<(u32, Enter)>,
    pub test: Expr,
}

/// A macro, the body of a call block, a block, or the whole template.
#[derive(Debug)]
pub(super) struct Function {
    pub name: Arc<str>,
    pub params: Vec<Param>,
    pub slots: u32,
    pub body: Body,
    /// Slots of these where the body reads them; only then are they accepted.
    pub varargs: Option<u32>,
    pub kwargs: Option<u32>,
    pub caller: Option<u32>,
}

#[derive(Debug)]
pub(super) struct Param {
    pub name: Arc<str>,
    pub slot: u32,
    pub default: Option<Expr>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Op {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Rem,
    Pow,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Debug)]
pub(super) enum Expr {
    Const(Value),
    /// A variable of the template, with its name's id.
    Slot(Place, u32),
    /// A variable of the caller, by name id.
    Global(u32),
    /// The text a filter block or set block has made.
    Captured,
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attr(Box<Expr>, Name),
    Item(Box<(Expr, Expr)>),
    Slice(Box<(Expr, [Option<Expr>; 3])>),
    Call(Box<Expr>, Args),
    Filter(Option<Filter>, Arc<str>, Box<Expr>, Args),
    Test(Option<Test>, Arc<str>, Box<Expr>, Args),
    Neg(Box<Expr>),
    Not(Box<Expr>),
    And(Box<(Expr, Expr)>),
    Or(Box<(Expr, Expr)>),
    /// `a + b + c`, from left to right.
    Sum(Vec<Expr>),
    /// `a ~ b ~ c`.
    Concat(Vec<Expr>),
    Bin(Op, Box<(Expr, Expr)>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    If(Box<(Expr, Expr, Option<Expr>)>),
}

/// An attribute's name, and the method that it can mean.
#[derive(Debug, Clone)]
pub(super) struct Name {
    pub text: Arc<str>,
    pub method: Option<Method>,
}

impl Name {
    pub fn new(text: &str) -> Name {
        Name {
            text: text.into(),
            method: Method::named(text),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Args {
    pub positional: Vec<Expr>,
    pub named: Vec<(Arc<str>, Expr)>,
    pub star: Option<Box<Expr>>,
    pub star_star: Option<Box<Expr>>,
}

/// A compiled template.
#[derive(Debug, Default)]
pub(super) struct Program {
    /// The first is the template itself.
    pub functions: Vec<Function>,
    pub loops: Vec<For>,
    pub names: Vec<Arc<str>>,
    pub ids: HashMap<Arc<str>, u32>,
    /// Names that are read somewhere, by id.
    pub reads: Vec<bool>,
}

impl Program {
    pub fn mentions(&self, name: &str) -> bool {
        self.id(name)
            .and_then(|id| self.reads.get(id as usize))
            .is_some_and(|read| *read)
    }

    pub fn id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }
}

//! What the machine's stack holds.

/// Number of a value; containers hold numbers, so that a cycle is no more than a number.
pub(super) type Id = usize;

/// A value.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// None, a number that is not needed, or an object whose attributes do not matter.
    Other,
    Bool,
    Integer(i64),
    Text(String),
    Tuple(Vec<Id>),
    List,
    Dictionary(Vec<(Id, Id)>),
    Name(Name),
    Storage(Storage),
    Tensor(Tensor),
}

impl Value {
    /// What it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Other => "an object",
            Self::Bool => "a boolean",
            Self::Integer(_) => "an integer",
            Self::Text(_) => "a text",
            Self::Tuple(_) => "a tuple",
            Self::List => "a list",
            Self::Dictionary(_) => "a dictionary",
            Self::Name(_) => "a function or class",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

/// The only names that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    OrderedDictionary,
    RebuildTensor,
    RebuildParameter,
    /// A storage class, by the name of its elements.
    StorageType(&'static str),
}

/// Storage classes of `torch`, and their elements.
const STORAGES: &[(&str, &str)] = &[
    ("FloatStorage", "float32"),
    ("HalfStorage", "float16"),
    ("BFloat16Storage", "bfloat16"),
    ("DoubleStorage", "float64"),
    ("LongStorage", "int64"),
    ("IntStorage", "int32"),
    ("ShortStorage", "int16"),
    ("CharStorage", "int8"),
    ("ByteStorage", "uint8"),
    ("BoolStorage", "bool"),
];

impl Name {
    /// A name of a module; `None` for every one that a dictionary of tensors does not need.
    pub(super) fn find(module: &str, name: &str) -> Option<Self> {
        match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDictionary),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", storage) => {
                let found = STORAGES.iter().find(|(known, _)| *known == storage)?;
                Some(Self::StorageType(found.1))
            }
            _ => None,
        }
    }
}

/// A storage: a member of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage {
    /// PyTorch's name of its elements.
    pub(super) dtype: &'static str,
    /// Name of its member below `data/`.
    pub(super) key: String,
    /// Number of its elements.
    pub(super) elements: u64,
}

/// A tensor: a view of a storage.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    /// Its first element in the storage.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    /// In elements.
    pub(super) strides: Vec<u64>,
}

//! The machine: the instructions of pickle protocols 2 to 4 that make dictionaries of tensors.
//!
//! Instructions: <https://github.com/python/cpython/blob/main/Lib/pickletools.py>

use std::collections::HashMap;

use super::value::{Id, Name, Storage, Tensor, Value};

/// Most values of a program, and most that its stack and its memo hold.
const MAX_VALUES: usize = 1 << 20;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;

type Outcome<T> = Result<T, String>;

/// Runs a program and gives the tensors of the dictionary that it makes, in its order.
///
/// # Errors
/// What is wrong with it: an instruction or a name that no such dictionary needs, or a program that ends early.
pub(super) fn tensors(program: &[u8]) -> Outcome<Vec<(String, Tensor)>> {
    let mut machine = Machine {
        program,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let result = machine.run()?;
    let Value::Dictionary(entries) = &machine.values[result] else {
        let kind = machine.values[result].kind();
        return Err(format!("it holds {kind} and no dictionary of tensors"));
    };
    let mut tensors = Vec::with_capacity(entries.len());
    for &(key, value) in entries {
        let Value::Text(name) = &machine.values[key] else {
            let kind = machine.values[key].kind();
            return Err(format!("a key of its dictionary is {kind} and no text"));
        };
        match &machine.values[value] {
            Value::Tensor(tensor) => tensors.push((name.clone(), tensor.clone())),
            other => {
                let kind = other.kind();
                return Err(format!(
                    "its entry {name} is {kind} and no tensor: save the state_dict alone"
                ));
            }
        }
    }
    Ok(tensors)
}

struct Machine<'a> {
    /// What is left of it.
    program: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Outcome<Id> {
        loop {
            let [instruction] = self.bytes()?;
            match instruction {
                b'.' => return self.pop(),
                0x80 => {
                    let [protocol] = self.bytes()?;
                    if !(2..=5).contains(&protocol) {
                        return Err(format!("it is of pickle protocol {protocol}; 2 to 5 are read"));
                    }
                }
                // A frame: its length only helps readers that buffer.
                0x95 => drop(self.bytes::<8>()?),
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.push(Value::Other)?,
                0x88 | 0x89 => self.push(Value::Bool)?,
                b'G' => {
                    self.bytes::<8>()?;
                    self.push(Value::Other)?;
                }
                b'K' | b'M' | b'J' | 0x8a => self.integer(instruction)?,
                b'X' | 0x8c | 0x8d => self.text(instruction)?,
                b'q' | b'r' | 0x94 | b'h' | b'j' => self.memory(instruction)?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                0x85..=0x87 => {
                    let height = self.stack.len().checked_sub(usize::from(instruction - 0x84));
                    let items = self.pop_from_height(height.ok_or_else(empty)?)?;
                    self.push(Value::Tuple(items))?;
                }
                b't' => {
                    let items = self.pop_from_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                b']' => self.push(Value::List)?,
                b'a' => drop(self.pop()?),
                b'e' => drop(self.pop_from_mark()?),
                b'}' => self.push(Value::Dictionary(Vec::new()))?,
                b's' => {
                    let height = self.stack.len().checked_sub(2).ok_or_else(empty)?;
                    let items = self.pop_from_height(height)?;
                    self.set(&items)?;
                }
                b'u' => {
                    let items = self.pop_from_mark()?;
                    self.set(&items)?;
                }
                b'c' | 0x93 => self.name(instruction)?,
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                b'b' => self.build()?,
                other => {
                    return Err(format!(
                        "it has the pickle instruction 0x{other:02x}, which no dictionary of tensors needs; nothing was run"
                    ));
                }
            }
        }
    }

    fn take(&mut self, length: usize) -> Outcome<&'a [u8]> {
        let (taken, rest) = self.program.split_at_checked(length).ok_or("its pickle is truncated")?;
        self.program = rest;
        Ok(taken)
    }

    fn bytes<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| "its pickle is truncated".to_owned())
    }

    fn line(&mut self) -> Outcome<&'a str> {
        let end = self
            .program
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or("its pickle is truncated")?;
        let line = self.take(end + 1)?;
        std::str::from_utf8(&line[..end]).map_err(|_| "a name in its pickle is not UTF-8".to_owned())
    }

    fn push(&mut self, value: Value) -> Outcome<()> {
        if self.values.len() == MAX_VALUES {
            return Err(format!("its pickle makes more than {MAX_VALUES} values"));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Outcome<Id> {
        // What lies below a mark is not to be reached before the mark is gone.
        match self.marks.last() {
            Some(&mark) if mark >= self.stack.len() => Err(empty()),
            _ => self.stack.pop().ok_or_else(empty),
        }
    }

    fn pop_from_height(&mut self, height: usize) -> Outcome<Vec<Id>> {
        match self.marks.last() {
            Some(&mark) if mark > height => Err(empty()),
            _ if height > self.stack.len() => Err(empty()),
            _ => Ok(self.stack.split_off(height)),
        }
    }

    fn pop_from_mark(&mut self) -> Outcome<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(empty)?;
        self.pop_from_height(mark)
    }

    fn top(&self) -> Outcome<Id> {
        self.stack.last().copied().ok_or_else(empty)
    }

    fn integer(&mut self, instruction: u8) -> Outcome<()> {
        let integer = match instruction {
            b'K' => u8::from_le_bytes(self.bytes()?).into(),
            b'M' => u16::from_le_bytes(self.bytes()?).into(),
            b'J' => i32::from_le_bytes(self.bytes()?).into(),
            _ => {
                let [length] = self.bytes()?;
                let given = self.take(usize::from(length))?;
                if given.len() > 8 {
                    return Err("its pickle has an integer of more than 64 bits".to_owned());
                }
                let sign = if given.last().is_some_and(|byte| byte & 0x80 != 0) {
                    0xff
                } else {
                    0
                };
                let mut bytes = [sign; 8];
                bytes[..given.len()].copy_from_slice(given);
                i64::from_le_bytes(bytes)
            }
        };
        self.push(Value::Integer(integer))
    }

    fn text(&mut self, instruction: u8) -> Outcome<()> {
        let length = match instruction {
            0x8c => u64::from(self.bytes::<1>()?[0]),
            b'X' => u32::from_le_bytes(self.bytes()?).into(),
            _ => u64::from_le_bytes(self.bytes()?),
        };
        let text = self.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        let text = std::str::from_utf8(text).map_err(|_| "a text in its pickle is not UTF-8")?;
        self.push(Value::Text(text.to_owned()))
    }

    /// Puts the top of the stack into the memo, or a value of the memo onto the stack.
    fn memory(&mut self, instruction: u8) -> Outcome<()> {
        let place = match instruction {
            b'q' | b'h' => self.bytes::<1>()?[0].into(),
            b'r' | b'j' => u32::from_le_bytes(self.bytes()?),
            _ => self.memo.len() as u32,
        };
        if matches!(instruction, b'h' | b'j') {
            let id = self
                .memo
                .get(&place)
                .ok_or_else(|| format!("its pickle has no value {place}"))?;
            self.stack.push(*id);
        } else {
            let id = self.top()?;
            self.memo.insert(place, id);
        }
        match self.stack.len().max(self.memo.len()) > MAX_VALUES {
            true => Err(format!("its pickle holds more than {MAX_VALUES} values")),
            false => Ok(()),
        }
    }

    /// Sets entries of the dictionary on top of the stack.
    fn set(&mut self, items: &[Id]) -> Outcome<()> {
        let id = self.top()?;
        let Value::Dictionary(entries) = &mut self.values[id] else {
            return Err("its pickle sets entries of what is no dictionary".to_owned());
        };
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err("its pickle sets a key without a value".to_owned());
        };
        entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
        match entries.len() > MAX_VALUES {
            true => Err(format!("its pickle makes more than {MAX_VALUES} values")),
            false => Ok(()),
        }
    }

    fn name(&mut self, instruction: u8) -> Outcome<()> {
        let (module, name) = match instruction {
            b'c' => (self.line()?.to_owned(), self.line()?.to_owned()),
            _ => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.values[module], &self.values[name]) {
                    (Value::Text(module), Value::Text(name)) => (module.clone(), name.clone()),
                    _ => return Err("its pickle has a name that is no text".to_owned()),
                }
            }
        };
        let found = Name::find(&module, &name).ok_or_else(|| {
            let shown: String = format!("{module}.{name}").chars().take(200).collect();
            format!("its pickle asks for {shown:?}, which no dictionary of tensors needs; nothing was run")
        })?;
        self.push(Value::Name(found))
    }

    /// A persistent id: `("storage", class, key, location, number of elements)`.
    fn storage(&mut self) -> Outcome<()> {
        let id = self.pop()?;
        let Value::Tuple(items) = &self.values[id] else {
            return Err("its pickle has a storage that is no tuple".to_owned());
        };
        let items: Vec<&Value> = items.iter().map(|&item| &self.values[item]).collect();
        let storage = match items.as_slice() {
            [
                Value::Text(kind),
                Value::Name(Name::StorageType(dtype)),
                Value::Text(key),
                Value::Text(_),
                Value::Integer(elements),
            ] if kind == "storage" => {
                let elements =
                    u64::try_from(*elements).map_err(|_| format!("storage {key} has {elements} elements"))?;
                Storage {
                    dtype,
                    key: key.clone(),
                    elements,
                }
            }
            _ => return Err("its pickle has a storage of unknown form".to_owned()),
        };
        self.push(Value::Storage(storage))
    }

    /// What would be a call: one of three known ones, whose result is made here.
    fn call(&mut self) -> Outcome<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Value::Name(function), Value::Tuple(arguments)) = (&self.values[function], &self.values[arguments]) else {
            return Err("its pickle calls what is no known name; nothing was run".to_owned());
        };
        match (function, arguments.as_slice()) {
            (Name::OrderedDictionary, []) => self.push(Value::Dictionary(Vec::new())),
            (Name::RebuildTensor, &[storage, offset, shape, strides, ..]) => {
                let tensor = self.tensor(storage, offset, shape, strides)?;
                self.push(Value::Tensor(tensor))
            }
            (Name::RebuildParameter, &[tensor, ..]) if matches!(self.values[tensor], Value::Tensor(_)) => {
                self.stack.push(tensor);
                Ok(())
            }
            _ => Err("its pickle makes an object with unknown arguments; nothing was run".to_owned()),
        }
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Outcome<Tensor> {
        let wrong = || "its pickle makes a tensor with unknown arguments".to_owned();
        let (Value::Storage(storage), &Value::Integer(offset)) = (&self.values[storage], &self.values[offset]) else {
            return Err(wrong());
        };
        let sizes = |id: Id| match &self.values[id] {
            Value::Tuple(items) if items.len() <= MAX_DIMENSIONS => items
                .iter()
                .map(|&item| match self.values[item] {
                    Value::Integer(size) => u64::try_from(size).ok(),
                    _ => None,
                })
                .collect::<Option<Vec<u64>>>(),
            _ => None,
        };
        let (shape, strides) = (sizes(shape).ok_or_else(wrong)?, sizes(strides).ok_or_else(wrong)?);
        if shape.len() != strides.len() {
            return Err(wrong());
        }
        Ok(Tensor {
            storage: storage.clone(),
            offset: u64::try_from(offset).map_err(|_| wrong())?,
            shape,
            strides,
        })
    }

    /// Attributes of a dictionary, such as the `_metadata` of a `state_dict`: left out.
    fn build(&mut self) -> Outcome<()> {
        self.pop()?;
        let id = self.top()?;
        match &self.values[id] {
            Value::Dictionary(_) => Ok(()),
            other => Err(format!("its pickle gives {} attributes; nothing was run", other.kind())),
        }
    }
}

fn empty() -> String {
    "its pickle takes from an empty stack".to_owned()
}

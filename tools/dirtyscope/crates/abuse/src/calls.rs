// SPDX-License-Identifier: GPL-2.0-only

//! The ioctls, what each takes, and arguments for them.

use crate::{
    rng::Rng,
    world::{IOVA, MAPPED, Spot, World, device_memory},
};
use mdev_dma::PAGE;
use std::fmt;
use vfio_client::hostile::{Answer, Flip, HostileFile, Request};

/// The file that a call is made on, or that an argument names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Container,
    Group,
    Device,
    Data,
    Iommufd,
    Eventfd,
    /// None that is open.
    Number(i32),
}

/// What a part of an argument is.
#[derive(Clone, Copy, Debug)]
enum Field {
    /// The size of the argument, as the user says.
    Argsz,
    /// Flags, of which these exist.
    Flags(u32),
    /// One of these, if it is to pass.
    Choice(&'static [u32]),
    /// A number that has to do with these.
    U32(&'static [u64]),
    U64(&'static [u64]),
    Iova,
    Length,
    /// The length of what is mapped.
    MapLength,
    Vaddr,
    Pointer,
    File,
    /// The name of a device, in 40 bytes.
    Name,
}

/// An ioctl.
pub struct Entry {
    pub name: &'static str,
    on: Target,
    request: Request,
    fields: &'static [Field],
    /// What the argument is if it has no fields.
    number: &'static [u64],
}

const fn entry(
    name: &'static str,
    on: Target,
    nr: u8,
    fields: &'static [Field],
    number: &'static [u64],
) -> Entry {
    Entry { name, on, request: Request::vfio(nr), fields, number }
}

use Field::{Argsz, Choice, File, Flags, Iova, Length, MapLength, Pointer, U32, U64, Vaddr};
use Target::{Container, Data, Device, Group, Iommufd};

const NONE: &[Field] = &[];
const NO: &[u64] = &[];
const PAGES: &[u64] = &[PAGE];
const INDICES: &[u64] = &[0, 1, 2, 3, 4, 5, 7, 9];
const STATES: &[u32] = &[0, 1, 2, 3, 4, 5, 6, 7];
/// `VFIO_IRQ_SET_*`: one action, one kind of data.
const IRQ_FLAGS: &[u32] = &[0x9, 0xa, 0xc, 0x11, 0x12, 0x14, 0x21, 0x22, 0x24];
/// `VFIO_DEVICE_FEATURE_*`, with GET, SET and PROBE.
const FEATURES: &[u32] = &[
    0x1_0001, 0x1_0002, 0x2_0002, 0x2_0002, 0x2_0002, 0x2_0003, 0x2_0006, 0x2_0007, 0x1_0008,
    0x1_0009, 0x2_000a, 0x4_0002, 0x7_0002, 0x2_0000, 0x1_000b,
];

/// All of them. Of those that a mediated device of ours or a kernel hasn't, that they are refused.
pub const ENTRIES: &[Entry] = &[
    entry("GET_API_VERSION", Container, 0, NONE, NO),
    entry("CHECK_EXTENSION", Container, 1, NONE, &[1, 3, 8, 10, 11]),
    entry("SET_IOMMU", Container, 2, NONE, &[1, 3, 8]),
    entry("IOMMU_GET_INFO", Container, 12, &[Argsz, Flags(3), U64(NO), U32(NO), U32(NO)], NO),
    entry("MAP_DMA", Container, 13, &[Argsz, Flags(7), Vaddr, Iova, MapLength], NO),
    entry(
        "UNMAP_DMA",
        Container,
        14,
        &[Argsz, Flags(7), Iova, Length, U64(PAGES), U64(&[8, 1 << 28]), Pointer],
        NO,
    ),
    entry(
        "DIRTY_PAGES",
        Container,
        17,
        &[Argsz, Flags(7), Iova, Length, U64(PAGES), U64(&[8, 1 << 28]), Pointer],
        NO,
    ),
    entry("GROUP_GET_STATUS", Group, 3, &[Argsz, Flags(0)], NO),
    entry("GROUP_SET_CONTAINER", Group, 4, &[File], NO),
    entry("GROUP_UNSET_CONTAINER", Group, 5, NONE, NO),
    entry("GROUP_GET_DEVICE_FD", Group, 6, &[Field::Name], NO),
    entry("DEVICE_GET_INFO", Device, 7, &[Argsz, Flags(0), U32(NO), U32(NO), U32(NO)], NO),
    entry(
        "GET_REGION_INFO",
        Device,
        8,
        &[Argsz, Flags(0), U32(INDICES), U32(NO), U64(NO), U64(NO)],
        NO,
    ),
    entry("GET_IRQ_INFO", Device, 9, &[Argsz, Flags(0), U32(INDICES), U32(NO)], NO),
    entry(
        "SET_IRQS",
        Device,
        10,
        &[
            Argsz,
            Choice(IRQ_FLAGS),
            Choice(&[0, 0, 1, 1, 2, 3, 4]),
            Choice(&[0, 0, 0, 1]),
            Choice(&[0, 1, 1, 1, 2]),
            File,
            File,
        ],
        NO,
    ),
    entry("RESET", Device, 11, NONE, NO),
    entry("HOT_RESET_INFO", Device, 12, &[Argsz, Flags(0), U32(NO), U32(NO), U32(NO)], NO),
    entry("HOT_RESET", Device, 13, &[Argsz, Flags(0), U32(&[1]), File], NO),
    entry("GFX_PLANE", Device, 14, &[Argsz, Flags(7), U32(NO), U32(NO), U64(NO), U64(NO)], NO),
    entry("GFX_DMABUF", Device, 15, &[U32(NO)], NO),
    entry("IOEVENTFD", Device, 16, &[Argsz, Flags(0xf), U64(NO), U64(NO), File, U32(NO)], NO),
    entry(
        "FEATURE",
        Device,
        17,
        &[Argsz, Choice(FEATURES), Choice(STATES), File, Iova, Length, Pointer],
        NO,
    ),
    entry("BIND_IOMMUFD", Device, 18, &[Argsz, Flags(1), File, U32(NO), Pointer], NO),
    entry("ATTACH_PT", Device, 19, &[Argsz, Flags(1), U32(NO), U32(NO)], NO),
    entry("DETACH_PT", Device, 20, &[Argsz, Flags(1), U32(NO)], NO),
    entry("PRECOPY_INFO", Data, 21, &[Argsz, Flags(0), U64(NO), U64(NO)], NO),
    entry("PRECOPY_INFO on device", Device, 21, &[Argsz, Flags(0), U64(NO), U64(NO)], NO),
    iommufd("IOAS_ALLOC", 0x81, &[Argsz, Flags(0), U32(NO)]),
    iommufd("IOAS_ALLOW_IOVAS", 0x82, &[Argsz, U32(&[1]), U32(&[1]), U32(NO), Pointer]),
    iommufd("IOAS_COPY", 0x83, &[Argsz, Flags(7), U32(&[1]), U32(&[1]), Length, Iova, Iova]),
    iommufd("IOAS_IOVA_RANGES", 0x84, &[Argsz, U32(&[1]), U32(&[1]), U32(NO), Pointer, U64(PAGES)]),
    iommufd("IOAS_MAP", 0x85, &[Argsz, Flags(7), U32(&[1]), U32(NO), Vaddr, MapLength, Iova]),
    iommufd("IOAS_UNMAP", 0x86, &[Argsz, U32(&[1]), Iova, Length]),
    iommufd("OPTION", 0x87, &[Argsz, U32(&[1]), Flags(1), U32(&[1]), U64(NO)]),
    iommufd("VFIO_IOAS", 0x88, &[Argsz, U32(&[1]), Flags(3), U32(NO)]),
    iommufd("HWPT_ALLOC", 0x89, &[Argsz, Flags(3), U32(&[1]), U32(&[1]), U64(NO), Pointer]),
    iommufd("DESTROY", 0x80, &[Argsz, U32(&[1, 2, 3])]),
];

const fn iommufd(name: &'static str, nr: u8, fields: &'static [Field]) -> Entry {
    Entry { name, on: Iommufd, request: Request(b';', nr), fields, number: NO }
}

/// A part of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    U32(u32),
    U64(u64),
    At(Spot),
    /// Memory of the device.
    DeviceMemory(u64),
    File(Target),
    /// The name of the device, or what it has at a byte instead.
    Name(Option<(usize, u8)>),
}

/// An ioctl with an argument.
#[derive(Clone, Debug)]
pub struct Call {
    pub name: &'static str,
    on: Target,
    request: Request,
    words: Vec<Word>,
    argument: Spot,
    /// What changes meanwhile: where, and to what.
    flip: Option<(usize, u64)>,
    /// Whether it passes what is checked first.
    pub passes: bool,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} at {}:", self.on, self.name, self.argument)?;
        for word in &self.words {
            match word {
                Word::U32(number) => write!(f, " {number:#x}")?,
                Word::U64(number) => write!(f, " {number:#x}")?,
                Word::At(spot) => write!(f, " {spot}")?,
                Word::DeviceMemory(offset) => write!(f, " memory+{offset:#x}")?,
                Word::File(file) => write!(f, " {file:?}")?,
                Word::Name(None) => write!(f, " name")?,
                Word::Name(Some((at, byte))) => write!(f, " name[{at}]={byte:#x}")?,
            }
        }
        match self.flip {
            Some((offset, to)) => write!(f, " while {offset:#x} is {to:#x}, too"),
            None => Ok(()),
        }
    }
}

impl Call {
    /// One with random arguments.
    pub fn random(rng: &mut Rng) -> Self {
        if rng.one_in(16) {
            return Self::unknown(rng);
        }
        let entry = &ENTRIES[rng.below(ENTRIES.len() as u64) as usize];
        Self::of(entry, rng)
    }

    /// One of this name, with random arguments.
    pub fn named(name: &str, rng: &mut Rng) -> Self {
        let entry = ENTRIES.iter().find(|entry| entry.name == name);
        match entry {
            Some(entry) => Self::of(entry, rng),
            None => Self::unknown(rng),
        }
    }

    /// A number that may be no ioctl.
    fn unknown(rng: &mut Rng) -> Self {
        let on = rng.pick(&[Container, Group, Device, Data, Iommufd]);
        let request = match rng.below(3) {
            0 => Request(b';', rng.below(256) as u8),
            1 => Request::vfio(22 + rng.below(64) as u8),
            _ => Request(rng.below(256) as u8, rng.below(256) as u8),
        };
        let argument = if rng.one_in(2) { Spot::Argument } else { rng.pick(&Spot::BAD) };
        let words = (0..8).map(|_| Word::U32(rng.u32(&[32]))).collect();
        Self { name: "other", on, request, words, argument, flip: None, passes: false }
    }

    fn of(entry: &Entry, rng: &mut Rng) -> Self {
        let &Entry { name, on, request, fields, number } = entry;
        if fields.is_empty() {
            let argument = match rng.below(3) {
                0 if !number.is_empty() => rng.pick(number),
                _ => rng.u64(number),
            };
            let argument = Spot::Number(argument);
            return Self {
                name,
                on,
                request,
                words: Vec::new(),
                argument,
                flip: None,
                passes: true,
            };
        }
        let size: u32 = fields.iter().map(|field| field.bytes()).sum();
        // One thing is wrong, or a few; half of the calls get past the first checks.
        let careful = rng.one_in(2);
        let mut passes = true;
        let words = fields.iter().map(|field| {
            let (word, good) = field.word(rng, size, careful);
            passes &= good;
            word
        });
        let words = words.collect();
        let argument = match rng.below(8) {
            _ if careful => Spot::Argument,
            0 => rng.pick(&Spot::BAD),
            1 => Spot::BeforeReadOnly(rng.pick(&[4, 8, u64::from(size), u64::from(size) - 4])),
            2 => Spot::BeforeEnd(rng.pick(&[4, 8, u64::from(size)])),
            _ => Spot::Argument,
        };
        passes &= argument == Spot::Argument;
        let flip = (argument == Spot::Argument && size > 8 && rng.one_in(24)).then(|| {
            let offset = 8 * rng.below(u64::from(size) / 8) as usize;
            (offset, rng.u64(&[PAGE, size.into()]))
        });
        Self { name, on, request, words, argument, flip, passes }
    }

    /// Whether it has an eventfd that is none: a negative number but -1, which stands for none.
    pub fn must_fail(&self) -> bool {
        const DATA_EVENTFD: u32 = 4;
        let (Some(Word::U32(flags)), Some(Word::U32(count))) =
            (self.words.get(1), self.words.get(4))
        else {
            return false;
        };
        let none = |word: &Word| matches!(word, Word::File(Target::Number(number)) if *number < -1);
        let eventfds = self.words.iter().skip(5).take(*count as usize);
        let given = self.name == "SET_IRQS" && flags & DATA_EVENTFD != 0 && self.flip.is_none();
        given && eventfds.into_iter().any(none)
    }

    /// Makes the call. Nothing if there is no such file here.
    pub fn make(&self, world: &World, eventfd: &HostileFile) -> Option<Answer> {
        let files = Files { world, eventfd };
        let file = files.get(self.on)?;
        let mut bytes = Vec::new();
        for word in &self.words {
            match *word {
                Word::U32(number) => bytes.extend(number.to_le_bytes()),
                Word::U64(number) => bytes.extend(number.to_le_bytes()),
                Word::At(spot) => bytes.extend(world.address(spot).to_le_bytes()),
                Word::DeviceMemory(offset) => {
                    bytes.extend((device_memory(world.ground) + offset).to_le_bytes());
                }
                Word::Name(other) => {
                    let mut name = [0; 40];
                    name[..36].copy_from_slice(&world.name().as_bytes()[..36]);
                    if let Some((at, byte)) = other {
                        name[at] = byte;
                    }
                    bytes.extend(name);
                }
                Word::File(Target::Number(number)) => bytes.extend(number.to_le_bytes()),
                Word::File(target) => {
                    let number = files.get(target).map_or(-1, HostileFile::number);
                    bytes.extend(number.to_le_bytes());
                }
            }
        }
        // What no user can write is left as it is, the rest is put where the argument is.
        let memory = world.ground.memory();
        let last = memory.len() - PAGE as usize;
        let at = match self.argument {
            Spot::Argument => Some(0),
            Spot::BeforeReadOnly(before) => Some(last - before as usize),
            _ => None,
        };
        if let Some(at) = at {
            memory.write(at, &bytes[..bytes.len().min(last - at)]);
        }
        let flip = self.flip.map(|(offset, other)| Flip { offset, other });
        Some(file.ioctl(world.ground, self.request, world.address(self.argument), flip))
    }
}

impl Field {
    fn bytes(self) -> u32 {
        match self {
            Argsz | Flags(_) | Choice(_) | U32(_) | File => 4,
            U64(_) | Iova | Length | MapLength | Vaddr | Pointer => 8,
            Field::Name => 40,
        }
    }

    /// A word for the field, and whether it passes the first checks.
    fn word(self, rng: &mut Rng, size: u32, careful: bool) -> (Word, bool) {
        const LIMITS: &[u64] = &[IOVA, IOVA + MAPPED * PAGE, MAPPED * PAGE];
        let whole = |value: u64| if careful { value & !(PAGE - 1) } else { value };
        match self {
            Argsz => {
                let argsz = if careful || rng.one_in(2) { size } else { rng.u32(&[size.into()]) };
                (Word::U32(argsz), argsz >= size)
            }
            Flags(known) => {
                let flags = match rng.below(4) {
                    0 if !careful => rng.u32(&[known.into()]),
                    1..3 => 1 << rng.below((u32::BITS - known.leading_zeros()).max(1).into()),
                    _ => rng.next() as u32,
                };
                let flags = if careful { flags & known } else { flags };
                (Word::U32(flags), flags & !known == 0)
            }
            Choice(all) => {
                let good = careful || rng.one_in(2);
                let number = if good { rng.pick(all) } else { rng.u32(&[all[0].into()]) };
                (Word::U32(number), all.contains(&number))
            }
            U32(limits) => (Word::U32(rng.u32(limits)), true),
            U64(limits) => (Word::U64(rng.u64(limits)), true),
            Iova => {
                let iova = match rng.one_in(2) {
                    true => IOVA + rng.below(2 * MAPPED) * PAGE,
                    false => whole(rng.u64(LIMITS)),
                };
                (Word::U64(iova), iova % PAGE == 0)
            }
            Length => {
                let length = match rng.one_in(2) {
                    true => rng.below(2 * MAPPED) * PAGE,
                    false => whole(rng.u64(LIMITS)),
                };
                (Word::U64(length), length % PAGE == 0)
            }
            MapLength => {
                let length = match rng.one_in(2) {
                    true => (1 + rng.below(MAPPED)) * PAGE,
                    false => whole(rng.u64(LIMITS)),
                };
                // A bitmap of a mapping this large takes memory that nobody is charged for (D16).
                let large = (1 << 34..1 << 43).contains(&length);
                let length = if large { length % (1 << 34) } else { length };
                (Word::U64(length), length % PAGE == 0)
            }
            Vaddr => match rng.below(4) {
                0..2 => (Word::DeviceMemory(rng.below(MAPPED) * PAGE), true),
                2 => (Word::At(Spot::Number(whole(rng.u64(&[])))), careful),
                _ => (Word::At(rng.pick(&Spot::BAD)), false),
            },
            Pointer => match rng.below(4) {
                0..2 => (Word::At(Spot::Buffer(8 * rng.below(1024))), true),
                2 => (Word::At(Spot::BeforeReadOnly(rng.below(64))), true),
                _ => (Word::At(rng.pick(&Spot::BAD)), true),
            },
            Field::Name => {
                let other = (!careful).then(|| (rng.below(40) as usize, rng.below(256) as u8));
                (Word::Name(other), true)
            }
            File => {
                let numbers = [-1, -2, 0, 9999, i32::MIN, i32::MAX].map(Target::Number);
                let files = [Target::Eventfd, Target::Eventfd, Container, Group, Device, Iommufd];
                let file = if rng.one_in(3) { rng.pick(&numbers) } else { rng.pick(&files) };
                (Word::File(file), true)
            }
        }
    }
}

struct Files<'a> {
    world: &'a World,
    eventfd: &'a HostileFile,
}

impl<'a> Files<'a> {
    fn get(&self, target: Target) -> Option<&'a HostileFile> {
        match target {
            Container => Some(&self.world.container.file),
            Group => self.world.group.as_ref(),
            Device => Some(self.world.file()),
            Data => self.world.data.last(),
            Iommufd => self.world.iommufd.as_ref(),
            Target::Eventfd => Some(self.eventfd),
            Target::Number(_) => None,
        }
    }
}

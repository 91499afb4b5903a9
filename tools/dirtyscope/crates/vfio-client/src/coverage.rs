// SPDX-License-Identifier: GPL-2.0-only

//! Which instructions of the kernel the calls of this process run, by KCOV.
//!
//! Does something only where the environment names a directory, in [`DIRECTORY`], and the kernel has
//! `CONFIG_KCOV`. Every thread is traced from its first call of this crate on (or of [`trace`]), with
//! what workers of the kernel do on its behalf. What was run for the first time is added to a file of
//! this process: lines of `MODULE SECTION OFFSET`, since modules are loaded anywhere. So nothing is
//! lost when the process is killed; but what a child of `fork()` runs is, until it executes a program.

use crate::sys::{self, FORKED};
use rustix::{
    fs::{Mode, OFlags, open},
    ioctl::opcode,
    mm::{MapFlags, ProtFlags, mmap, munmap},
    thread::gettid,
};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashSet},
    env,
    fs::{self, File},
    io::{Result, Write},
    os::fd::OwnedFd,
    path::Path,
    ptr::{NonNull, null_mut},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// The environment variable that names the directory.
pub const DIRECTORY: &str = "DIRTYSCOPE_COVERAGE";

/// Words of a thread's buffer: one call that runs more loses the rest.
const WORDS: usize = 1 << 17;

/// Words of a worker's.
const REMOTE_WORDS: u32 = 1 << 16;

/// Where modules are: what is elsewhere is of the kernel's image, or no address at all.
const MODULES: std::ops::Range<u64> = 0xffff_ffff_a000_0000..0xffff_ffff_ff00_0000;

thread_local! {
    static THREAD: RefCell<Option<Thread>> = const { RefCell::new(None) };
}

static PROCESS: OnceLock<Option<Mutex<Process>>> = OnceLock::new();

/// Traces this thread from now on, if it is to be traced.
pub fn trace() {
    call(|| ());
}

/// How many places have been run for the first time since this was last asked, `None` if nothing is
/// traced.
pub fn fresh() -> Option<usize> {
    let process = process()?;
    Some(std::mem::take(&mut process.lock().unwrap_or_else(PoisonError::into_inner).fresh))
}

/// Makes a call to the kernel, and takes note of what it has run.
pub(crate) fn call<T>(make: impl FnOnce() -> T) -> T {
    // A child of fork() may neither allocate nor lock.
    if FORKED.load(Relaxed) || process().is_none() {
        return make();
    }
    // A thread that ends has its last calls traced no more.
    let _ = THREAD.try_with(|thread| {
        thread.borrow_mut().get_or_insert_with(|| Thread::new().expect("trace a thread by KCOV"));
    });
    let result = make();
    let _ = THREAD.try_with(|thread| thread.borrow().as_ref().map(Thread::take));
    result
}

fn process() -> Option<&'static Mutex<Process>> {
    let new = || env::var_os(DIRECTORY).map(|directory| Process::new(directory.as_ref()));
    PROCESS.get_or_init(|| new().map(|new| Mutex::new(new.expect("write coverage")))).as_ref()
}

/// What a thread runs, and what workers run for it, which a task can't have in one buffer.
struct Thread {
    own: Buffer,
    remote: Buffer,
}

impl Thread {
    fn new() -> rustix::io::Result<Self> {
        let (own, remote) = (Buffer::new()?, Buffer::new()?);
        let handle = gettid().as_raw_nonzero().get() as u64;
        let mut arg =
            RemoteArg { area_size: REMOTE_WORDS, common_handle: handle, ..Default::default() };
        // SAFETY: The kernel reads the structure, which says that no more handles follow.
        unsafe { sys::raw_ioctl(&remote.file, REMOTE_ENABLE, (&raw mut arg).cast()) }?;
        // SAFETY: The argument is a number.
        unsafe { sys::raw_ioctl(&own.file, ENABLE, null_mut()) }?;
        Ok(Self { own, remote })
    }

    fn take(&self) {
        let Some(process) = process() else { return };
        let mut process = process.lock().unwrap_or_else(PoisonError::into_inner);
        for buffer in [&self.own, &self.remote] {
            let mut places = buffer.take();
            places.sort_unstable();
            places.dedup();
            process.add(&places).expect("write coverage");
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.take();
    }
}

const INIT_TRACE: u32 = opcode::read::<u64>(b'c', 1);
const ENABLE: u32 = opcode::none(b'c', 100);
const REMOTE_ENABLE: u32 = opcode::write::<RemoteArg>(b'c', 102);

/// `struct kcov_remote_arg`, with no handles but the common one, and to trace addresses.
#[repr(C)]
#[derive(Default)]
struct RemoteArg {
    trace_mode: u32,
    area_size: u32,
    num_handles: u32,
    _padding: u32,
    common_handle: u64,
}

/// Addresses that the kernel has run: the first word is how many follow.
///
/// # Invariants
///
/// `words` points to `WORDS` words, mapped for as long as this is. The kernel writes them at any time.
struct Buffer {
    file: OwnedFd,
    words: NonNull<AtomicU64>,
}

impl Buffer {
    fn new() -> rustix::io::Result<Self> {
        let file = open("/sys/kernel/debug/kcov", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // SAFETY: The argument is a number.
        unsafe { sys::raw_ioctl(&file, INIT_TRACE, std::ptr::without_provenance_mut(WORDS)) }?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: The kernel chooses an address at which nothing is.
        let words = unsafe { mmap(null_mut(), WORDS * 8, access, MapFlags::SHARED, &file, 0) }?;
        // INVARIANT: It was mapped, which never is at 0.
        Ok(Self { file, words: NonNull::new(words.cast()).expect("memory is mapped at 0") })
    }

    /// All that was run since the last time.
    fn take(&self) -> Vec<u64> {
        // SAFETY: By the type invariant; words that the kernel writes as well are atomic.
        let words = unsafe { std::slice::from_raw_parts(self.words.as_ptr(), WORDS) };
        let mut count = words[0].load(Relaxed);
        // A worker may add to it meanwhile.
        while let Err(more) = words[0].compare_exchange(count, 0, Relaxed, Relaxed) {
            count = more;
        }
        let last = (count as usize).min(WORDS - 1);
        words[1..=last].iter().map(|word| word.load(Relaxed)).collect()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; nothing refers to it any more.
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), WORDS * 8) };
        debug_assert!(unmapped.is_ok());
    }
}

/// What the process has run.
struct Process {
    file: File,
    seen: HashSet<u64>,
    fresh: usize,
    /// What `/proc/modules` said when `sections` was made.
    modules: String,
    sections: Sections,
}

impl Process {
    fn new(directory: &Path) -> Result<Self> {
        let path = directory.join(std::process::id().to_string());
        let file = File::options().append(true).create(true).open(path)?;
        let (modules, sections) = (String::new(), Sections::default());
        Ok(Self { file, seen: HashSet::new(), fresh: 0, modules, sections })
    }

    fn add(&mut self, places: &[u64]) -> Result<()> {
        let new: Vec<_> = places
            .iter()
            .copied()
            .filter(|place| MODULES.contains(place) && self.seen.insert(*place))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        self.fresh += new.len();
        // A module may have been loaded again, elsewhere.
        let modules = fs::read_to_string("/proc/modules")?;
        if modules != self.modules {
            self.sections = Sections::read(modules.split(' ').next().unwrap_or_default());
            self.modules = modules;
        }
        let lines: String = new.iter().filter_map(|&place| self.sections.line(place)).collect();
        self.file.write_all(lines.as_bytes())
    }
}

/// The sections with code of all modules: of each address at which one begins, the names of module and
/// section.
#[derive(Default)]
struct Sections(BTreeMap<u64, String>);

impl Sections {
    /// `newest` is the module that was loaded last. Memory that the others had for what they run once has
    /// been freed, and may be its own.
    fn read(newest: &str) -> Self {
        let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
        let modules = entries("/sys/module".as_ref());
        let all = modules.flat_map(|module| {
            let name = module.file_name().to_string_lossy().into_owned();
            let sections = entries(&module.path().join("sections"));
            sections.filter_map(move |section| {
                let address = fs::read_to_string(section.path()).ok()?;
                Some((address, name.clone(), section.file_name().to_string_lossy().into_owned()))
            })
        });
        Self::new(all.filter(|(_, module, section)| module == newest || !section.contains("init")))
    }

    fn new(sections: impl IntoIterator<Item = (String, String, String)>) -> Self {
        let text = sections.into_iter().filter(|(_, _, section)| section.contains("text"));
        let entry = |(address, module, section): (String, _, _)| {
            let address = u64::from_str_radix(address.trim().trim_start_matches("0x"), 16);
            Some((address.ok()?, format!("{module} {section}")))
        };
        Self(text.filter_map(entry).collect())
    }

    fn line(&self, place: u64) -> Option<String> {
        let (begin, names) = self.0.range(..=place).next_back()?;
        Some(format!("{names} {:#x}\n", place - begin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_belongs_to_the_section_that_begins_before_it() {
        let section = |address: &str, module: &str, name: &str| {
            (address.to_owned(), module.to_owned(), name.to_owned())
        };
        let sections = Sections::new([
            section("0xffffffffc0001000\n", "vfio", ".text"),
            section("0xffffffffc0002000\n", "type1", ".text"),
            section("0xffffffffc0002800\n", "type1", ".data"),
            section("0xffffffffc0009000\n", "type1", ".init.text"),
            section("?", "odd", ".text"),
        ]);
        assert_eq!(sections.line(0xffffffffc0001fff).unwrap(), "vfio .text 0xfff\n");
        assert_eq!(sections.line(0xffffffffc0002900).unwrap(), "type1 .text 0x900\n");
        assert_eq!(sections.line(0xffffffffc0009000).unwrap(), "type1 .init.text 0x0\n");
        assert_eq!(sections.line(0xffffffffc0000fff), None);
    }
}

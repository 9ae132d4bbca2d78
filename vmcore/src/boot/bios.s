# The interrupt services of bios.rs, in one segment from offset 0. CF and ZF are answered in the flags
# on the stack, which are at 6(%bp) behind a saved BP. Labels are .L ones, others would hide C functions.

.pushsection .rodata
.code16

.globl vmcore_bios_start
.hidden vmcore_bios_start
vmcore_bios_start:
        movb    $0x11, %al              # both 8259s: ICW1, then vectors 8 and 0x70, cascade, 8086 mode
        outb    %al, $0x20
        outb    %al, $0xa0
        movb    $0x08, %al
        outb    %al, $0x21
        movb    $0x70, %al
        outb    %al, $0xa1
        movb    $0x04, %al
        outb    %al, $0x21
        movb    $0x02, %al
        outb    %al, $0xa1
        movb    $0x01, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        movb    $0xfe, %al              # only the timer's interrupt is let through
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1
        movb    $0x34, %al              # 8254 channel 0: mode 2, 18.2 Hz
        outb    %al, $0x43
        xorb    %al, %al
        outb    %al, $0x40
        outb    %al, $0x40
        movw    $0x3fb, %dx             # COM1: 8 bits, no parity
        movb    $0x03, %al
        outb    %al, %dx
        movw    %ss, %ax                # and on to the setup code
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %fs
        movw    %ax, %gs
        addw    $0x20, %ax
        pushw   %ax
        pushw   $0
        lretw

.Ltimer:                                  # INT 8: IRQ 0
        pushw   %ds
        pushw   %ax
        pushw   $0x40
        popw    %ds
        incl    0x6c
        movb    $0x20, %al
        outb    %al, $0x20
        popw    %ax
        popw    %ds
        int     $0x1c
.Lignore: iretw

.Lvideo:                                  # INT 10h
        cmpb    $0x0e, %ah
        je      .Lteletype
        cmpb    $0x03, %ah
        je      .Lcursor
        cmpb    $0x0f, %ah
        jne     .Lignore
        movw    $0x5003, %ax            # mode 3: 80 columns
        movb    $0, %bh
        iretw
.Lcursor: movw    $0x0607, %cx
        xorw    %dx, %dx
        iretw
.Lteletype:
        pushw   %dx
        pushw   %ax
        movw    $0x3fd, %dx
1:      inb     %dx, %al
        testb   $0x20, %al              # the transmitter is empty
        jz      1b
        popw    %ax
        movw    $0x3f8, %dx
        outb    %al, %dx
        popw    %dx
        iretw

.Lequipment:                              # INT 11h: coprocessor, 80x25
        movw    $0x0022, %ax
        iretw

.Lbase_memory:                            # INT 12h
        pushw   %ds
        pushw   $0x40
        popw    %ds
        movw    0x13, %ax
        popw    %ds
        iretw

.Lsystem:                                 # INT 15h
        cmpw    $0xe820, %ax
        je      .Lmap
        cmpb    $0x24, %ah
        je      .Lsuccess                 # A20 is always on
        cmpw    $0xe801, %ax
        je      .Lsizes
        cmpb    $0x88, %ah
        jne     .Lunsupported
        movw    %cs:.Lkib_below_16m - vmcore_bios_start, %ax
        jmp     .Lclear_carry
.Lsizes:  movw    %cs:.Lkib_below_16m - vmcore_bios_start, %ax
        movw    %cs:.Lblocks_above_16m - vmcore_bios_start, %bx
        movw    %ax, %cx
        movw    %bx, %dx
        jmp     .Lclear_carry
.Lmap:    cmpl    $0x534d4150, %edx       # "SMAP"
        jne     .Lunsupported
        cmpl    $20, %ecx
        jb      .Lunsupported
        cmpw    %cs:vmcore_bios_end - vmcore_bios_start, %bx
        jae     .Lunsupported
        pushw   %si
        pushw   %di
        imulw   $20, %bx, %si
        addw    $(vmcore_bios_end - vmcore_bios_start + 2), %si
        movw    $10, %cx
        cld
        rep movsw %cs:(%si), %es:(%di)
        popw    %di
        popw    %si
        movl    %edx, %eax
        movl    $20, %ecx
        incw    %bx
        cmpw    %cs:vmcore_bios_end - vmcore_bios_start, %bx
        jb      .Lclear_carry
        xorl    %ebx, %ebx              # that was the last
        jmp     .Lclear_carry
.Lsuccess:
        movb    $0, %ah
.Lclear_carry:
        pushw   %bp
        movw    %sp, %bp
        andb    $0xfe, 6(%bp)
        popw    %bp
        iretw

.Lunsupported:
        movb    $0x86, %ah
.Lset_carry:
        pushw   %bp
        movw    %sp, %bp
        orb     $0x01, 6(%bp)
        popw    %bp
        iretw

.Lkeyboard:                               # INT 16h, enhanced functions too: COM1
        andb    $0xef, %ah
        jz      .Lwait_key
        cmpb    $0x01, %ah
        je      .Lpeek_key
        movb    $0, %al                 # no shift key is pressed
        iretw
.Lwait_key:
        call    .Lpoll
        jnz     1f
        sti                             # until the next timer tick
        hlt
        cli
        jmp     .Lwait_key
1:      movw    $0, %cs:.Lkey - vmcore_bios_start
        iretw
.Lpeek_key:
        call    .Lpoll
        pushw   %bp
        movw    %sp, %bp
        jz      1f
        andb    $0xbf, 6(%bp)
        popw    %bp
        iretw
1:      orb     $0x40, 6(%bp)
        popw    %bp
        iretw
.Lpoll:                                   # AX: scan code and character, or ZF
        movw    %cs:.Lkey - vmcore_bios_start, %ax
        testw   %ax, %ax
        jnz     2f
        pushw   %dx
        movw    $0x3fd, %dx
        inb     %dx, %al
        andw    $1, %ax
        jz      1f
        movw    $0x3f8, %dx
        inb     %dx, %al
        movb    $0x01, %ah
        movw    %ax, %cs:.Lkey - vmcore_bios_start
        testw   %ax, %ax
1:      popw    %dx
2:      ret

.Lreset:                                  # INT 18h and 19h: nothing to boot
        movb    $0xfe, %al
        outb    %al, $0x64
        hlt
        jmp     .Lreset

.Ltime:                                   # INT 1Ah
        testb   %ah, %ah
        jnz     .Lset_carry               # no clock here, and no PCI
        pushw   %ds
        pushw   $0x40
        popw    %ds
        movw    0x6c, %dx
        movw    0x6e, %cx
        popw    %ds
        movb    $0, %al
        jmp     .Lclear_carry

.Lkey:    .word   0

# What bios.rs reads and fills in: sizes, where the other vectors lead, and vectors with their handlers.
.balign 2
.globl vmcore_bios_table
.hidden vmcore_bios_table
vmcore_bios_table:
.Lkib_below_16m:
        .word   0
.Lblocks_above_16m:
        .word   0
        .word   .Lignore - vmcore_bios_start
        .word   0x08, .Ltimer - vmcore_bios_start
        .word   0x10, .Lvideo - vmcore_bios_start
        .word   0x11, .Lequipment - vmcore_bios_start
        .word   0x12, .Lbase_memory - vmcore_bios_start
        .word   0x13, .Lunsupported - vmcore_bios_start
        .word   0x15, .Lsystem - vmcore_bios_start
        .word   0x16, .Lkeyboard - vmcore_bios_start
        .word   0x18, .Lreset - vmcore_bios_start
        .word   0x19, .Lreset - vmcore_bios_start
        .word   0x1a, .Ltime - vmcore_bios_start

# The number of entries of the memory map, and they.
.globl vmcore_bios_end
.hidden vmcore_bios_end
vmcore_bios_end:

.code64
.popsection

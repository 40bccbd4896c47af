/* Runs each file named on the command line through the target this is linked with: what libFuzzer's own main does, without
 * clang.  A target that finds something ends the program. */
#include "input.h"

int main(int argc, char **argv)
{
    static uint8_t data[1 << 16];

    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        size_t size;

        if (file == NULL) {
            perror(argv[i]);
            return 2;
        }
        size = fread(data, 1, sizeof data, file);
        (void)fclose(file);
        (void)LLVMFuzzerTestOneInput(data, size);
    }
    printf("%s: %d seeds\n", argv[0], argc - 1);
    return argc < 2; /* no seeds: the pattern in c.mk matched nothing */
}

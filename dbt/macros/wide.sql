{#- A number for adding up: sums of INT64 end at 2^63, these hold 29 digits. (Not a cast: the emulator's lose their digits.) -#}
{%- macro wide(expression) -%}
    {{ expression }} * numeric '1'
{%- endmacro -%}
